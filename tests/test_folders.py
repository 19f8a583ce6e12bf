"""What a run may overwrite, and what resuming means: train.py and checkpoint.py where a user does things twice."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT, pseudo_text, resume, run_script
from test_train import assert_same_run, load, metrics

import evaluate
import export
import prepare
import train
from nanodrift import checkpoint
from nanodrift.data import Windows
from nanodrift.options import UserError
from train import Schedule, TrainConfig, Trainer


def contents(folder):
    """{file: hash} of a folder."""
    hashes = {}
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), 'rb') as f:
            hashes[name] = hashlib.sha256(f.read()).hexdigest()
    return hashes


def start(command_line, **overrides):
    return train.train(*train.read_settings(command_line(**overrides)))


# ---------------------------------------------------------------------------------------------------------------------
# folders

def test_a_folder_that_holds_a_run_is_kept_unless_told(command_line, settings):
    out_dir = settings()['out_dir']
    assert start(command_line, max_iters=6, keep_every=2) == 0
    before = contents(out_dir)
    assert 'ckpt_000002.pt' in before
    with pytest.raises(UserError, match='holds a run.*--init_from=resume.*--overwrite=True'):
        start(command_line, max_iters=4)
    assert contents(out_dir) == before
    assert start(command_line, max_iters=3, overwrite=True) == 0
    assert 'ckpt_000002.pt' not in contents(out_dir) and load(out_dir)['iter_num'] == 3
    assert metrics(out_dir)[0]['iter'] == 0


@pytest.mark.parametrize('mistake', [{'dataset': 'typo'}, {'block_size': 10**6}, {'gradient_accumulation_steps': 4,
                                      'model_type': 'drifting', 'encoder': 'nowhere'}])
def test_overwriting_waits_until_the_new_run_can_begin(command_line, settings, mistake):
    out_dir = settings()['out_dir']
    assert start(command_line) == 0
    before = contents(out_dir)
    with pytest.raises(UserError):
        start(command_line, overwrite=True, **mistake)
    assert contents(out_dir) == before


def test_auto_starts_then_resumes(command_line, settings):
    straight = settings(out_dir='straight')['out_dir']
    assert start(command_line, out_dir='straight', max_iters=6) == 0
    out_dir = settings(out_dir='auto')['out_dir']
    for max_iters in (6, 6):
        words = command_line(out_dir='auto', init_from='auto', max_iters=max_iters)
        config, model_config, state = train.read_settings(words)
        assert config.init_from == ('scratch' if state is None else 'resume')
        if state is None:
            trainer = Trainer(config, model_config, train.setup_ranks('cpu', 'auto', 60))
            trainer._step(), trainer._step(), trainer.save('last')
            trainer.log.close()
        else:
            assert train.train(config, model_config, state) == 0
    assert load(out_dir)['iter_num'] == 6
    a, b = load(straight), load(out_dir)
    assert all((a['model'][name] == b['model'][name]).all() for name in a['model'])


@pytest.mark.parametrize('name', ['init_from', 'encoder'])
def test_a_run_does_not_overwrite_what_it_comes_from(command_line, settings, name):
    out_dir = settings()['out_dir']
    assert start(command_line) == 0
    before = contents(out_dir)
    more = {'model_type': 'drifting'} if name == 'encoder' else {'dataset': 'tiny_byte'}
    with pytest.raises(UserError, match=f'is {name} too.*another --out_dir'):
        start(command_line, overwrite=True, **more, **{name: out_dir})
    assert contents(out_dir) == before


def test_an_exported_model_is_not_written_over(command_line, settings, tmp_path):
    assert start(command_line) == 0
    model = str(tmp_path / 'exported')
    export.main([f'--out_dir={settings()["out_dir"]}', f'--to={model}'])
    before = contents(model)
    for more in ({'init_from': f'hf:{model}'}, {}, {'init_from': settings()['out_dir']}):
        with pytest.raises(UserError, match='another --out_dir'):
            start(command_line, out_dir='exported', overwrite=True, **more)
    assert contents(model) == before
    with pytest.raises(UserError, match=f'write hf:{model}'):
        start(command_line, out_dir='tuned', init_from=model)
    assert start(command_line, out_dir='tuned', init_from=f'hf:{model}') == 0


def test_any_other_folder_may_be_named(command_line, tmp_path, monkeypatch):
    """Words of --init_from are no folders, and no encoder is not the folder where one is."""
    monkeypatch.chdir(tmp_path)
    assert start(command_line, out_dir='scratch') == 0
    monkeypatch.chdir(tmp_path / 'scratch')
    words = [word for word in command_line() if not word.startswith('--out_dir')]
    assert train.main([*words, '--out_dir=.', '--overwrite=True']) == 0


def test_auto_starts_where_its_config_says(command_line, settings, tmp_path):
    assert start(command_line, out_dir='source') == 0
    (tmp_path / 'tune.py').write_text(f'init_from = {settings(out_dir="source")["out_dir"]!r}\n')
    words = [f'{tmp_path}/tune.py', *command_line(out_dir='tuned', init_from='auto')]
    assert train.read_settings(words)[0].init_from == settings(out_dir='source')['out_dir']
    assert train.main(words) == 0 and train.read_settings(words)[0].init_from == 'resume'
    assert train.read_settings(command_line(out_dir='new', init_from='auto'))[0].init_from == 'scratch'


def test_a_longer_run_keeps_the_line_of_the_last_evaluation(command_line, settings):
    """Of a run that ends between two evaluations, and has become worse."""
    config, model_config, _ = train.read_settings(command_line(max_iters=7, eval_interval=5, learning_rate=1e-9))
    with pytest.MonkeyPatch.context() as patch:
        real, losses = Trainer.evaluate, iter((3.0, 3.0, 2.0, 2.0, 9.0, 9.0))
        patch.setattr(Trainer, 'evaluate', lambda *args: real(*args) | {'loss': next(losses)})
        assert train.train(config, model_config) == 0
    assert resume(settings()['out_dir'], '--max_iters=12') == 0
    assert [entry['iter'] for entry in metrics(settings()['out_dir']) if 'val_loss' in entry] == [0, 5, 7, 10, 12]


def test_resuming_on_another_text_is_refused(tmp_path, command_line, settings, capsys):
    for name, seed in (('one', 1), ('two', 2)):
        (tmp_path / f'{name}.txt').write_text(pseudo_text(seed=seed), encoding='utf-8')
        prepare.main([f'--input={tmp_path}/{name}.txt', f'--name={name}', '--tokenizer=byte', '--num_proc=1',
                      f'--data_dir={tmp_path}'])
    out_dir = settings()['out_dir']
    assert start(command_line, dataset='one_byte', data_dir=str(tmp_path)) == 0
    before = contents(out_dir)
    with pytest.raises(UserError, match='dataset=one_byte, not two_byte.*--init_from=.*--out_dir=NEW'):
        resume(out_dir, '--dataset=two_byte', '--max_iters=9')
    prepare.main([f'--input={tmp_path}/two.txt', '--name=one', '--tokenizer=byte', '--num_proc=1', f'--data_dir={tmp_path}'])
    with pytest.raises(UserError, match='prepared anew.*another text'):
        resume(out_dir, '--max_iters=9')
    assert contents(out_dir) == before
    evaluate.main([f'--out_dir={out_dir}', '--device=cpu'])
    assert 'prepared anew since' in ' '.join(capsys.readouterr().out.split())


def test_two_runs_do_not_write_to_one_folder(tmp_path, command_line):
    with checkpoint.lock(str(tmp_path / 'run')):
        with pytest.raises(UserError, match='another run is writing'):
            start(command_line)
    assert start(command_line) == 0


def test_a_file_system_without_locks(tmp_path, command_line, monkeypatch):
    def flock(*args):
        raise OSError(95, 'Operation not supported')
    monkeypatch.setattr(checkpoint.fcntl, 'flock', flock)
    assert start(command_line, max_iters=2) == 0


def hold(folder):
    with checkpoint.lock(folder):
        with open(os.path.join(folder, 'held'), 'w', encoding='utf-8'):
            time.sleep(600)


@pytest.mark.slow
def test_the_lock_of_a_killed_process_is_free(tmp_path, fork):
    process = fork(hold, str(tmp_path / 'run'))
    while not (tmp_path / 'run' / 'held').exists():
        time.sleep(0.05)
    with pytest.raises(UserError, match='another run'):
        with checkpoint.lock(str(tmp_path / 'run')):
            pass
    process.kill()
    process.join()
    with checkpoint.lock(str(tmp_path / 'run')):
        pass


def test_a_folder_that_is_removed_during_a_run_is_one_line(tiny, monkeypatch):
    config, *rest = tiny()
    real = Trainer.evaluate

    def evaluate(self, split):
        shutil.rmtree(config.out_dir, ignore_errors=True)
        return real(self, split)
    monkeypatch.setattr(Trainer, 'evaluate', evaluate)
    with pytest.raises(UserError, match='cannot write a checkpoint'):
        train.train(config, *rest)


def test_settings_that_cannot_be_written_leave_the_former(tiny, monkeypatch):
    """config.json, where the disk is full just then."""
    config, *rest = tiny()
    assert train.train(config, *rest) == 0
    before = contents(config.out_dir)

    def replace(*paths):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'replace', replace)
    with pytest.raises(UserError, match='No space left'):
        resume(config.out_dir, '--max_iters=9')
    assert contents(config.out_dir) == before


def test_evaluating_other_weights_leaves_no_line_in_a_run(command_line, settings):
    out_dir = settings()['out_dir']
    assert start(command_line) == 0 and start(command_line, out_dir='other', seed=5) == 0
    before = contents(out_dir)
    assert start(command_line, init_from=settings(out_dir='other')['out_dir'], eval_only=True) == 0
    assert contents(out_dir) == before


# ---------------------------------------------------------------------------------------------------------------------
# what resuming means

@pytest.mark.parametrize('given, iterations', [
    (['--num_epochs=0.5', '--max_iters=3'], 3), (['--max_iters=3', '--num_epochs=0.5'], 29), (['--max_iters=7'], 7)])
def test_the_length_that_is_given_last_counts(command_line, given, iterations):
    words = [word for word in command_line() if not word.startswith('--max_iters')]
    config, _, _ = train.read_settings(words + given)
    assert Schedule(config, 232, 4).max_iters == iterations


def test_epochs_then_iterations(command_line, settings, capsys):
    """A run of so many epochs goes on for so many iterations where that is said."""
    out_dir = settings()['out_dir']
    assert start(command_line, num_epochs=0.03) == 0
    done = load(out_dir)['iter_num']
    assert resume(out_dir, '--max_iters=9') == 0
    assert done < load(out_dir)['iter_num'] == 9
    assert resume(out_dir) == 0
    assert 'nothing left to train: iteration 9 of 9' in capsys.readouterr().out


@pytest.mark.parametrize('batch_size', [2, 8])
def test_another_batch_size_sees_the_rest_of_the_epoch_once(command_line, settings, monkeypatch, batch_size):
    seen, real = [], Windows.offsets
    out_dir = settings()['out_dir']
    assert start(command_line, num_epochs=0.5, eval_interval=1000, eval_iters=1) == 0
    half = load(out_dir)['examples_seen']
    monkeypatch.setattr(Windows, 'offsets', lambda self, numbers: (seen.extend(numbers), real(self, numbers))[1])
    assert resume(out_dir, '--num_epochs=1', f'--batch_size={batch_size}') == 0
    windows = Windows(os.path.join(settings()['data_dir'], 'tiny_byte', 'train.bin'), 'uint16', 17, 16)
    assert seen == list(range(half, half + len(seen))) and len(windows) <= half + len(seen) < len(windows) + batch_size


def test_a_run_of_before_has_seen_its_iterations(command_line, settings):
    out_dir = settings()['out_dir']
    assert start(command_line) == 0
    state = load(out_dir)
    del state['examples_seen'], state['data']
    checkpoint.save(out_dir, state, ['last'])
    config, model_config, state = train.read_settings(['--init_from=resume', f'--out_dir={out_dir}', '--max_iters=9'])
    trainer = Trainer(config, model_config, train.setup_ranks('cpu', 'auto', 60), state)
    trainer.log.close()
    assert trainer.examples_seen == 6 * 4


def test_a_rate_that_jumps_is_told(command_line, settings, capsys):
    out_dir = settings()['out_dir']
    assert start(command_line) == 0
    capsys.readouterr()
    assert resume(out_dir, '--max_iters=60', '--eval_only=True') == 0
    assert 'the learning rate goes from' in capsys.readouterr().out


def test_a_rate_that_climbs_is_refused():
    with pytest.raises(UserError, match='min_lr=0.0006 must be at most learning_rate'):
        TrainConfig(learning_rate=3e-5, min_lr=6e-4)
    TrainConfig(learning_rate=3e-5, min_lr=6e-4, decay_lr=False)


# ---------------------------------------------------------------------------------------------------------------------
# signals and ranks

@pytest.mark.parametrize('number', train.STOPPING)
def test_a_signal_during_an_evaluation_ends_it(tiny, monkeypatch, number):
    """With the checkpoint that was saved before; resuming evaluates and goes on as if nothing had been."""
    straight, *rest = tiny(out_dir='straight', eval_iters=4)
    assert train.train(straight, *rest) == 0
    config, *rest = tiny(out_dir='cut', eval_iters=4)
    calls, real = [], Trainer.evaluate

    def evaluate(self, split):
        if self.iter_num == 3 and not calls:
            calls.append(os.kill(os.getpid(), number))
        return real(self, split)
    monkeypatch.setattr(Trainer, 'evaluate', evaluate)
    assert train.train(config, *rest) == 128 + number
    assert load(config.out_dir)['iter_num'] == 3 and load(config.out_dir)['evaluated_iter'] != 3
    monkeypatch.setattr(Trainer, 'evaluate', real)
    assert resume(config.out_dir) == 0
    assert_same_run(straight.out_dir, config.out_dir)


@pytest.mark.slow
def test_a_launcher_may_set_rank_alone(command_line, settings):
    env = {'RANK': '0', 'WORLD_SIZE': '1', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': '29655'}
    run_script('train.py', *command_line(max_iters=2), env=env)
    out_dir = settings()['out_dir']
    done = run_script('evaluate.py', f'--out_dir={out_dir}', '--device=cpu', env=env)
    assert 'loss' in json.loads(done.stdout.splitlines()[-1])['likelihood'][out_dir]


@pytest.mark.slow
def test_every_rank_says_what_is_wrong(command_line):
    done = run_script('train.py', *command_line(batch_size=0), check=False, env={'RANK': '3', 'LOCAL_RANK': '3'})
    assert done.returncode == 2 and done.stderr.startswith('train.py: rank 3: batch_size=0')


@pytest.mark.parametrize('when, kept', [(3, None), (6, 3)])
def test_weights_that_are_no_numbers_are_not_kept(tiny, monkeypatch, when, kept):
    """Where an evaluation finds that, the last checkpoint is the best one again, or none where there is no better one."""
    real = Trainer.evaluate

    def evaluate(self, split):
        return real(self, split) | ({'loss': float('nan')} if self.iter_num == when else {})
    monkeypatch.setattr(Trainer, 'evaluate', evaluate)
    config, *rest = tiny()
    with pytest.raises(SystemExit, match='validation loss is nan.*' + ('best one again' if kept else 'no better')):
        train.train(config, *rest)
    assert os.path.exists(os.path.join(config.out_dir, 'ckpt.pt')) == bool(kept)
    assert not kept or load(config.out_dir)['iter_num'] == kept


@pytest.mark.slow
def test_training_goes_on_where_nobody_reads(command_line, settings):
    """A reader of the output that leaves, as head does, ends neither the run nor its checkpoints."""
    words = [sys.executable, 'train.py', *command_line(max_iters=40, log_interval=1)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(300) == 0
    assert load(settings()['out_dir'])['iter_num'] == 40


def test_a_sample_that_nobody_reads_ends_quietly(command_line, settings):
    assert start(command_line) == 0
    words = [sys.executable, 'sample.py', f"--out_dir={settings()['out_dir']}", '--num_samples=200', '--max_new_tokens=200',
             '--device=cpu', '--ignore_eot=True', '--start=a']
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert b'Traceback' not in process.stderr.read() and process.wait(300) in (0, 141)
