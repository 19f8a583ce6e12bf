"""The heat-kernel experiment: what is learned and what is left out, the files of a run, its command line."""
import json
import math
from functools import partial

import pytest
import torch
from conftest import pseudo_text
from test_machine import exit_code, finish
from test_metrics import slow_calibration

import prepare
import sample
import train
import train_diffusion_attention as experiment
from model import GPT, GPTConfig, load_model
from nanodrift import checkpoint
from nanodrift.objectives import IGNORE, ignoring
from nanodrift.options import UserError

SMALL = ['--n_layers=2', '--d_model=16', '--d_ff=40', '--n_heads=2', '--seq_len=16', '--batch_size=4', '--eval_iters=2',
         '--eval_interval=2', '--max_iters=4', '--device=cpu', '--compile=False']


def run_experiment(log_dir, data_dir, *args, name='run'):
    """Runs the experiment on the tiny data set; returns the folder of the run."""
    place = [f'--dataset={data_dir}/tiny_byte', f'--log_dir={log_dir}', f'--exp_name={name}']
    assert experiment.main([*SMALL, *place, *args]) == 0
    return log_dir / name


@pytest.fixture
def go(tmp_path, data_dir):
    """go(*args) runs the experiment on the tiny data set; returns its folder."""
    return partial(run_experiment, tmp_path, data_dir)


# ---------------------------------------------------------------------------------------------------------------------
# what is learned

def test_the_published_labels_are_shifted_twice_and_scored_once():
    tokens = torch.arange(12).view(2, 6)
    X, Y, _ = experiment.shifted_batch(tokens, None)
    assert X.tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]] and Y.tolist() == [[2, 3, 4, 5], [8, 9, 10, 11]]
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=4, vocab_size=12, n_layer=1, n_head=1, n_embd=8)).eval()
    with torch.no_grad():
        found = experiment.summary(experiment.measure(model, X, Y, None, published=True))
        logits, loss = model(X, Y)
    assert found['loss'] == pytest.approx(loss.item(), rel=1e-5)
    following = slow_calibration(logits[:, :-1].flatten(0, 1), X[:, 1:].flatten())
    assert found['ece'] == pytest.approx(following['ece'], abs=1e-5)
    assert found['scored_accuracy'] == pytest.approx(following['accuracy'])
    scored = [experiment.measure(model, X, Y, None, published=True, ignored=ids)['scored'] for ids in ((), [1], [7, 8])]
    assert [calibration.sums['count'] for calibration in scored] == [6, 5, 4]  # of the 3 labels in each of the two rows


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


def test_wikitext_that_was_not_prepared_is_named(tmp_path):
    with pytest.raises(UserError, match='wikitext-2'):
        experiment.main([*SMALL, f'--data_dir={tmp_path}', f'--log_dir={tmp_path}', '--dataset=wikitext-2'])


def test_a_bpe_data_set_takes_ignored_text_too(tmp_path):
    (tmp_path / 'a.txt').write_text(pseudo_text(80) + ' <unk>', encoding='utf-8')
    prepare.main([f'--input={tmp_path / "a.txt"}', '--name=a', '--tokenizer=bpe:300', '--num_proc=1',
                  f'--data_dir={tmp_path}'])
    place = [f'--dataset={tmp_path}/a_bpe300', f'--log_dir={tmp_path}', '--exp_name=bpe', '--ignore_text= <unk>']
    assert experiment.main([*SMALL, *place]) == 0


def rank(argv):
    return exit_code(argv, experiment)


def test_it_is_for_one_process(fork_ranks, tmp_path, data_dir):
    words = [*SMALL, f'--dataset={data_dir}/tiny_byte', f'--log_dir={tmp_path}/logs', '--exp_name=run']
    said = finish(fork_ranks(rank, words), tmp_path, code=2)
    assert 'start it without torchrun' in said and 'Traceback' not in said and not (tmp_path / 'logs').exists()
