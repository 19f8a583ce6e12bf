"""bench.py measures both sides and says so in JSON. A small stand-in has the interface of a nanoGPT checkout."""
import json

from conftest import run_script

TINY = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=16', '--vocab_size=300', '--batch_size=2', '--rounds=2',
        '--new_tokens=8', '--compile=False', '--streams=1,2']

STAND_IN = '''
import torch
import model as ours
class GPTConfig(ours.GPTConfig): pass
class GPT(ours.GPT):
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate)
    @torch.no_grad()
    def generate(self, idx, count, temperature, top_k):
        for _ in range(count):
            logits, _ = self(idx[:, -self.config.block_size:])
            idx = torch.cat((idx, logits[:, -1].argmax(-1, keepdim=True)), 1)
'''


def test_alone():
    found = json.loads(run_script('bench.py', *TINY).stdout.splitlines()[-1])
    assert found['peak_gflops'] > 0 and found['peak_MiB']['ours'] > 10
    for part in ('train', 'generate_1', 'generate_2'):
        row = found[part]['ours']
        assert 0 < row['ms_min'] <= row['ms'] <= row['ms_max'] and row['tokens_per_s'] > 0


def test_against_another_checkout(tmp_path):
    (tmp_path / 'model.py').write_text(STAND_IN)
    found = json.loads(run_script('bench.py', *TINY, f'--against={tmp_path}').stdout.splitlines()[-1])
    assert found['train']['ratio'] > 0 and found['generate_2']['ratio'] > 0
    assert set(found['peak_MiB']) == {'ours', 'nanoGPT'}


def test_both_sides_start_from_the_same_weights_and_see_the_same_batches(tmp_path):
    import torch

    import bench
    from model import GPTConfig
    (tmp_path / 'model.py').write_text(STAND_IN)
    config = bench.BenchConfig(against=str(tmp_path), compile=False)
    sizes = GPTConfig(block_size=16, vocab_size=320, n_layer=1, n_head=2, n_embd=16)
    cpu = torch.device('cpu')
    sides = [make(config, sizes, cpu, 'float32') for make in (bench.our_side, bench.nanogpt_side)]
    losses = [[side.step(*batch).item() for batch, _ in zip(bench.batches(config, sizes, cpu), range(2))]
              for side in sides]
    assert abs(losses[0][0] - losses[1][0]) < 1e-5
    assert losses[0][0] != losses[0][1]


def test_both_sides_learn_the_same(tmp_path):
    (tmp_path / 'model.py').write_text(STAND_IN)
    words = [w for w in TINY if 'vocab' not in w] + ['--vocab_size=320', f'--against={tmp_path}', '--part=loss', '--steps=8']
    loss = json.loads(run_script('bench.py', *words).stdout.splitlines()[-1])['loss']
    assert abs(loss['ours'] - loss['nanoGPT']) < 0.02


def test_a_wrong_path_is_one_line():
    done = run_script('bench.py', *TINY, '--against=nowhere', check=False)
    assert done.returncode == 2 and 'model.py' in done.stderr and done.stderr.count('\n') == 1


def test_the_types_beside_gpt2():
    words = [*TINY, '--n_layer=2', '--part=types', '--variants=gpt2,parallel mean,duo']
    found = json.loads(run_script('bench.py', *words).stdout.splitlines()[-1])
    assert list(found['types']) == list(found['peak_MiB']) == ['gpt2', 'parallel mean', 'duo']
    assert found['types']['gpt2']['ratio'] == 1 and found['types']['duo']['ratio'] > 0
    done = run_script('bench.py', *TINY, '--part=types', '--variants=gpt3', check=False)
    assert done.returncode == 2 and 'heat adaptive' in done.stderr


def test_duo_dense_is_duo():
    import torch

    import bench
    from model import GPTConfig
    sizes = GPTConfig(block_size=16, vocab_size=30, n_layer=2, n_head=2, n_embd=16)
    X, Y = torch.randint(30, (2, 16)), torch.randint(30, (2, 31))
    losses = []
    for name in ('duo', 'duo dense'):
        side = bench.type_side(name, bench.BenchConfig(compile=False), sizes, torch.device('cpu'), 'float32')
        losses.append(side.model(X, Y)[1].item())
    assert abs(losses[0] - losses[1]) < 1e-5


def test_refinement_beside_left_to_right():
    found = json.loads(run_script('bench.py', *TINY, '--part=refine', '--max_steps=2,16').stdout.splitlines()[-1])
    for streams in (1, 2):
        rows = found[f'refine_{streams}']
        assert list(rows) == ['gpt2', '2 steps', '16 steps'] and rows['2 steps']['ratio'] < rows['16 steps']['ratio']
