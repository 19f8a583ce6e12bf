"""The heat-kernel experiment: calibration against a slow version, what is left out, the files of a run, the figures."""
import json
import math
import os

import pytest
import torch
from conftest import pseudo_text

import prepare
import sample
import train
import train_diffusion_attention as experiment
from experiments import plot_results
from experiments.temperature import fit_temperature, score
from experiments.temperature import main as temperature_main
from model import GPT, GPTConfig
from nanodrift import checkpoint
from nanodrift.objectives import IGNORE, ignoring
from nanodrift.options import UserError
from nanodrift.report import plt

SMALL = ['--n_layers=2', '--d_model=16', '--d_ff=40', '--n_heads=2', '--seq_len=16', '--batch_size=4', '--eval_iters=2',
         '--eval_interval=2', '--max_iters=4', '--device=cpu', '--compile=False']


@pytest.fixture
def go(tmp_path, data_dir):
    """go(*args) runs the experiment on the tiny data set; returns its folder."""
    def start(*args, name='run'):
        place = [f'--dataset={data_dir}/tiny_byte', f'--log_dir={tmp_path}', f'--exp_name={name}']
        assert experiment.main([*SMALL, *place, *args]) == 0
        return tmp_path / name
    return start


# ---------------------------------------------------------------------------------------------------------------------
# calibration

def slow_calibration(logits, targets):
    """One position at a time, in Python floats."""
    rows = []
    for row, target in zip(logits.double(), targets.tolist()):
        if target == IGNORE:
            continue
        p = (row - row.max()).exp()
        p = (p / p.sum()).tolist()
        confidence = max(p)
        brier = sum((q - (v == target)) ** 2 for v, q in enumerate(p))
        rows.append((confidence, float(p.index(confidence) == target), brier, -sum(q * math.log(q) for q in p)))
    n, ece = len(rows), 0.0
    for b in range(BINS):
        inside = [r for r in rows if b / BINS < r[0] <= (b + 1) / BINS]
        if inside:
            ece += abs(sum(r[1] for r in inside) - sum(r[0] for r in inside)) / n
    mean = [sum(r[i] for r in rows) / n for i in range(4)]
    return {'ece': ece, 'confidence': mean[0], 'accuracy': mean[1], 'brier': mean[2], 'entropy': mean[3],
            'overconfidence': mean[0] - mean[1], 'brier_top1': sum((r[0] - r[1]) ** 2 for r in rows) / n,
            'entropy_std': math.sqrt(sum((r[3] - mean[3]) ** 2 for r in rows) / n),
            'entropy_min': min(r[3] for r in rows), 'entropy_max': max(r[3] for r in rows)}


@pytest.mark.parametrize('sharpness', [0.3, 2.0, 6.0])
def test_calibration_is_that_of_a_slow_count(sharpness):
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 11, generator=rng) * sharpness
    targets = torch.randint(11, (400,), generator=rng)
    targets[::7] = logits[::7].argmax(-1)
    targets[::13] = IGNORE
    parts = zip(logits.split(90), targets.split(90))
    found = calibration(add([calibration_sums(x, y) for x, y in parts]))
    for name, wanted in slow_calibration(logits, targets).items():
        assert found[name] == pytest.approx(wanted, abs=1e-5), name
    assert sum(n for n, _, _ in found['bins']) == (targets != IGNORE).sum()


def test_certainty_and_its_opposite():
    sure = torch.full((4, 3), -1e4)
    sure[:, 1] = 0.0
    right, wrong = torch.tensor([1, 1, 1, 1]), torch.tensor([0, 0, 2, 2])
    assert calibration(calibration_sums(sure, right))['ece'] == 0
    found = calibration(calibration_sums(sure, wrong))
    assert found['ece'] == 1 and found['brier'] == 2 and found['overconfidence'] == 1 and found['entropy'] == 0


def slow_loss(logits, targets, temperature):
    """Mean cross entropy over the counted positions, in float64."""
    losses = [(row / temperature).log_softmax(-1)[t].neg().item() for row, t in zip(logits.double(), targets) if t != IGNORE]
    return sum(losses) / len(losses)


def test_the_fitted_temperature_is_the_best_one():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=12, n_layer=1, n_head=1, n_embd=8)).eval()
    pieces = []
    for factor in (3.0, 6.0):  # hidden states whose logits are too sure of themselves
        x = torch.randn(5, 8, 8) * factor * 20
        y = torch.distributions.Categorical(logits=model.head(x).detach() / 4).sample()
        y[0, :3] = IGNORE
        pieces.append((x, y))
    found = fit_temperature(model, pieces)
    logits = torch.cat([model.head(x).detach().flatten(0, 1) for x, _ in pieces])
    targets = torch.cat([y.flatten() for _, y in pieces])
    best = min((1 + i / 50 for i in range(300)), key=lambda t: slow_loss(logits, targets, t))
    assert found == pytest.approx(best, abs=0.03) and 2.5 < found < 6
    assert score(model, pieces, found)['loss'] == pytest.approx(slow_loss(logits, targets, found), rel=1e-5)


def test_a_checkpoint_is_scored_on_one_half_and_scaled_by_the_other(go, tmp_path, capsys):
    folder = go('--max_iters=12', '--lr=1e-2')
    temperature_main([f'--out_dir={folder}', '--device=cpu', '--ckpt=last'])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found['temperature'] > 0 and found['temperature'] != 1
    assert found['as_it_is']['accuracy'] == found['scaled']['accuracy']  # no temperature changes the likeliest token
    assert found['as_it_is']['ece'] != found['scaled']['ece']
    before = found['as_it_is']
    temperature_main([f'--out_dir={folder}', '--device=cpu', '--ckpt=last', '--ignore_text=e'])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])['as_it_is']['loss'] > before['loss']
    (tmp_path / 'a.txt').write_text(pseudo_text(2000))
    prepare.main([f'--input={tmp_path}/a.txt', '--name=other', '--tokenizer=char', f'--data_dir={tmp_path}'])
    with pytest.raises(UserError, match='tokenizer'):
        temperature_main([f'--out_dir={folder}', f'--data={tmp_path}/other_char'])


# ---------------------------------------------------------------------------------------------------------------------
# what is learned

def test_the_published_labels_are_shifted_twice_and_scored_once():
    tokens = torch.arange(12).view(2, 6)
    X, Y, _ = experiment.shifted_batch(tokens, None)
    assert X.tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]] and Y.tolist() == [[2, 3, 4, 5], [8, 9, 10, 11]]
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=4, vocab_size=12, n_layer=1, n_head=1, n_embd=8)).eval()
    with torch.no_grad():
        found = experiment.summarize(experiment.measure(model, X, Y, None, published=True))
        logits, loss = model(X, Y)
    assert found['loss'] == pytest.approx(loss.item(), rel=1e-5)
    following = slow_calibration(logits[:, :-1].flatten(0, 1), X[:, 1:].flatten())
    assert found['ece'] == pytest.approx(following['ece'], abs=1e-5)
    assert found['scored_accuracy'] == pytest.approx(following['accuracy'])
    scored = [experiment.measure(model, X, Y, None, True, ignored)['scored_count'] for ignored in ((), [1], [7, 8])]
    assert scored == [6, 5, 4]  # of the 3 labels in each of the two rows


def slow_parts(row, ids):
    """Every place that the sequence may have, also one partly outside; one token alone tells nothing, unless it is all."""
    n, hit = len(ids), [False] * len(row)
    for start in range(1 - n, len(row)):
        inside = [i for i in range(n) if 0 <= start + i < len(row)]
        if len(inside) >= min(2, n) and all(row[start + i] == ids[i] for i in inside):
            for i in inside:
                hit[start + i] = True
    return hit


@pytest.mark.parametrize('ids', [[1], [1, 0], [1, 1], [0, 1, 0], [1, 0, 0, 1]])
def test_ignored_text_leaves_its_own_targets_out(ids):
    tokens = torch.randint(2, (200, 7), generator=torch.Generator().manual_seed(0))
    _, Y, _ = ignoring(lambda tokens, rng, part: (tokens[:, :-1], tokens[:, 1:], None), ids)(tokens, None)
    wanted = torch.tensor([slow_parts(row, ids) for row in tokens.tolist()])
    assert wanted.any() and not wanted.all()
    assert torch.equal(Y == IGNORE, wanted[:, 1:]) and torch.equal(Y[Y != IGNORE], tokens[:, 1:][Y != IGNORE])
    assert ignoring(lambda tokens, *_: (tokens, tokens[:, -3:], None), [5] * 9)(tokens, None)[1].equal(tokens[:, -3:])


def test_the_ignored_text_is_that_of_the_data_sets_tokenizer(go):
    folder = go('--ignore_text= the', '--epochs=1')
    entries = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    assert entries[-1]['val_bins'] and entries[-1]['iter'] == 4
    plain = go(name='plain')
    counted = [sum(n for n, _, _ in json.loads((f / 'metrics.json').read_text())['val_bins'][-1]) for f in (folder, plain)]
    assert counted[0] < counted[1]


# ---------------------------------------------------------------------------------------------------------------------
# runs

@pytest.mark.parametrize('model', experiment.MODELS)
@pytest.mark.parametrize('published', [False, True])
def test_a_run_leaves_what_was_published_and_more(go, model, published):
    folder = go(f'--model={model}', f'--published={published}')
    for name in ('config.json', 'metrics.jsonl', 'metrics.json', 'best_model.pt', 'final_model.pt'):
        assert (folder / name).stat().st_size > 0, name
    metrics = json.loads((folder / 'metrics.json').read_text())
    assert metrics['iter'] == [0, 2, 4]
    for name in ('perplexity', 'accuracy', 'ece', 'brier', 'brier_top1', 'confidence', 'overconfidence', 'entropy',
                 'entropy_std', 'entropy_min', 'entropy_max'):
        assert len(metrics[f'val_{name}']) == 3 and all(math.isfinite(v) for v in metrics[f'val_{name}']), name
    assert metrics['val_perplexity'][-1] == pytest.approx(math.exp(metrics['val_loss'][-1]), rel=1e-5)
    if model == 'diffusion_adaptive':
        assert [len(times) for times in metrics['val_diffusion_times']] == [2, 2, 2]
        assert metrics['val_diffusion_times'][0] == pytest.approx([1.0, 1.0])
    state = checkpoint.load(str(folder / 'best_model.pt'))
    assert state['model_args']['n_inner'] == 40 and load_model(state).config.n_layer == 2


def test_the_recipe_is_the_published_one(data_dir):
    c, _ = experiment.read_settings([f'--dataset={data_dir}/tiny_byte', '--max_tokens', 'None', '--save_every=None'])
    assert (c.model, c.fixed_t, c.epochs, c.max_tokens, c.eval_interval, c.save_every) == ('standard', 1.0, 10, 0, 500, 0)
    config, model = experiment.train_config(c), experiment.model_config(c)
    assert (model.n_layer, model.n_embd, model.n_head, model.n_inner, model.block_size) == (4, 256, 4, 1024, 256)
    assert config.min_lr == pytest.approx(config.learning_rate / 10)
    assert (config.learning_rate, config.weight_decay, config.grad_clip) == (3e-4, 0.01, 1.0)
    assert (config.batch_size, config.num_epochs, config.stride, config.warmup_iters) == (32, 10.0, 1, 0)
    assert (config.lr_schedule, config.beta1, config.beta2, model.dropout) == ('cosine', 0.9, 0.999, 0.1)


def test_every_flag_arrives_where_it_counts(go):
    of = lambda *args: experiment.model_config(experiment.read_settings(list(args))[0])  # noqa: E731
    assert of().model_type == 'gpt2'
    assert of('--model=diffusion_fixed').heat_time() == 1.0
    assert of('--model=diffusion_fixed', '--fixed_t=0.28').heat_time() == 0.28
    model = of('--model=diffusion_adaptive', '--t_min=0.2', '--t_max=5', '--published=True')
    assert (model.heat_t, model.heat_t_min, model.heat_t_max, model.published) == ('adaptive', 0.2, 5.0, True)
    c, _ = experiment.read_settings(['--published=True'])
    objective = experiment.experiment_objective(c, None)
    assert objective.window(16) == 18 and objective.make_batch(torch.arange(18)[None], None)[1][0, 0] == 2
    folder = go('--model=diffusion_adaptive', '--lr=0.05', '--max_iters=6', '--t_max=4')
    times = json.loads((folder / 'metrics.json').read_text())['val_diffusion_times']
    assert times[0] == pytest.approx([0.4 ** 0.5] * 2, rel=1e-4) and len(set(times[-1])) == 2 and times[-1] != times[0]


@pytest.mark.parametrize('wrong, reason', [
    (['--epochs=0'], 'epochs=0'), (['--d_ff=0'], 'd_ff'), (['--stride=0'], 'stride'), (['--lr=-1'], '^lr='),
    (['--n_layers=0'], 'n_layers'), (['--model=diffusion_fixed', '--fixed_t=0'], 'fixed_t'),
    (['--fixed_t=0.28'], 'diffusion_fixed'), (['--model=diffusion_fixed', '--t_max=5'], 'diffusion_adaptive'),
    (['--model=diffusion_adaptive', '--t_min=20'], 't_max'), (['--d_model=10', '--n_heads=4'], 'n_heads'),
])
def test_settings_that_make_no_sense_are_refused_by_their_own_names(wrong, reason):
    with pytest.raises(UserError, match=reason):
        experiment.read_settings(wrong)


def test_resuming_keeps_the_settings(go, tmp_path):
    folder = go('--model=diffusion_adaptive', '--dropout=0.2', '--lr=0.01', '--max_iters=2')
    assert experiment.main([f'--resume={folder}', '--max_iters=4']) == 0
    state = checkpoint.load(str(folder / 'final_model.pt'))
    assert state['iter_num'] == 4 and state['config']['dropout'] == 0.2 and state['config']['learning_rate'] == 0.01
    assert json.loads((folder / 'metrics.json').read_text())['iter'] == [0, 2, 4]
    with pytest.raises(UserError, match='no checkpoint'):
        experiment.main([f'--resume={tmp_path}'])
    with pytest.raises(UserError, match='published=True: a resumed run keeps published=False'):
        experiment.main([f'--resume={folder}', '--published=True'])
    assert json.loads((folder / 'config.json').read_text())['experiment']['model'] == 'diffusion_adaptive'


def test_each_script_goes_on_with_its_own_runs_alone(go, tiny, capsys):
    folder = go('--max_iters=2')
    with pytest.raises(UserError, match='train_diffusion_attention.py.*--resume='):
        train.read_settings(['--init_from=resume', f'--out_dir={folder}'])
    with pytest.raises(UserError, match='holds a run: --resume='):
        go()
    config, model_config = tiny(out_dir='plain')
    train.train(config, model_config)
    with pytest.raises(UserError, match='not made by this script'):
        experiment.main([f'--resume={config.out_dir}'])
    sample.main([f'--out_dir={folder}', '--num_samples=1', '--max_new_tokens=5', '--device=cpu'])
    assert '5 tokens' in capsys.readouterr().err


def test_checkpoints_that_are_kept_and_tokens_that_are_not_used(go):
    folder = go('--save_every=1', '--max_tokens=800', '--stride=16')
    assert sorted(p.name for p in folder.glob('ckpt_0*')) == [f'ckpt_{i:06d}.pt' for i in (1, 2, 3, 4)]
    assert checkpoint.load(str(folder / 'ckpt_000003.pt'))['iter_num'] == 3
    with pytest.raises(UserError, match='80 tokens, fewer than one window'):
        go('--max_tokens=800', '--seq_len=128', name='short')


@pytest.fixture
def drawn(monkeypatch):
    """{file name: the axes that were saved in it}"""
    found, real = {}, plt.Figure.savefig
    monkeypatch.setattr(plt.Figure, 'savefig', lambda fig, path, **k: (found.update({os.path.basename(path): fig.axes[0]}),
                                                                       real(fig, path, **k)))
    return found


def test_the_figures(go, tiny, tmp_path, capsys, drawn):
    folders = [go(name='standard'), go('--model=diffusion_fixed', '--n_layers=1', name='heat'),
               go('--model=diffusion_adaptive', name='adaptive')]
    out = tmp_path / 'figures'
    plot_results.main([*map(str, folders), f'--out={out}'])
    names = {p.name for p in out.iterdir()}
    assert names == {f'{n}.png' for n in ('loss', 'accuracy', 'perplexity', 'dynamics', 'trade_off', 'reliability', 'depth',
                                          'time_law')}
    assert all((out / name).read_bytes().startswith(b'\x89PNG') for name in names)
    for name in ('loss', 'accuracy', 'perplexity', 'dynamics', 'trade_off'):
        axes = drawn[f'{name}.png']
        assert [line.get_label() for line in axes.lines] == ['standard', 'heat', 'adaptive'], name
        assert all(len(line.get_xdata()) == (2 if name == 'trade_off' else 3) for line in axes.lines), name
    ece = [plot_results.Run(str(folder)).last('val_ece') for folder in folders]
    assert [line.get_ydata()[-1] for line in drawn['dynamics.png'].lines] == ece
    assert len(drawn['reliability.png'].lines) == 4 and len(drawn['depth.png'].containers) == 3
    labels = drawn['time_law.png'].get_legend_handles_labels()[1]
    assert labels == ['0.28 * sqrt(4 / L)', 'adaptive, each layer', 'fixed t of the lowest ECE']
    config, model_config = tiny(out_dir='plain')
    train.train(config, model_config)
    plot_results.main([str(folders[0]), f'{config.out_dir}/metrics.jsonl', f'--out={tmp_path}/more'])
    assert [line.get_label() for line in drawn['perplexity.png'].lines] == ['standard', 'plain']
    for wrong in ([], [str(tmp_path)]):
        with pytest.raises(UserError, match='folder'):
            plot_results.main(wrong)


def test_wikitext_that_was_not_prepared_is_named(tmp_path):
    with pytest.raises(UserError, match='wikitext-2'):
        experiment.main([*SMALL, f'--data_dir={tmp_path}', f'--log_dir={tmp_path}', '--dataset=wikitext-2'])


def test_a_bpe_data_set_takes_ignored_text_too(tmp_path):
    (tmp_path / 'a.txt').write_text(pseudo_text(80) + ' <unk>', encoding='utf-8')
    prepare.main([f'--input={tmp_path / "a.txt"}', '--name=a', '--tokenizer=bpe:300', '--num_proc=1',
                  f'--data_dir={tmp_path}'])
    place = [f'--dataset={tmp_path}/a_bpe300', f'--log_dir={tmp_path}', '--exp_name=bpe', '--ignore_text= <unk>']
    assert experiment.main([*SMALL, *place]) == 0
