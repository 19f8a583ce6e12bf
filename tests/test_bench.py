"""bench.py measures both sides and says so in JSON. A small stand-in has the interface of a nanoGPT checkout."""
import json
import subprocess
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import run_script

import bench
from model import GPTConfig

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


@pytest.mark.slow
def test_alone():
    found = json.loads(run_script('bench.py', *TINY).stdout.splitlines()[-1])
    assert found['peak_gflops'] > 0 and found['peak_MiB']['ours'] > 10
    for part in ('train', 'generate_1', 'generate_2'):
        row = found[part]['ours']
        assert 0 < row['ms_min'] <= row['ms'] <= row['ms_max'] and row['tokens_per_s'] > 0
    assert found['generate_1']['share_of_products'] > 0


@pytest.mark.slow
def test_against_another_checkout(tmp_path):
    (tmp_path / 'model.py').write_text(STAND_IN)
    found = json.loads(run_script('bench.py', *TINY, f'--against={tmp_path}').stdout.splitlines()[-1])
    assert found['train']['ratio'] > 0 and found['generate_2']['ratio'] > 0
    assert set(found['peak_MiB']) == {'ours', 'nanoGPT'}


def test_both_sides_start_from_the_same_weights_and_see_the_same_batches(tmp_path):
    (tmp_path / 'model.py').write_text(STAND_IN)
    config = bench.BenchConfig(against=str(tmp_path), compile=False)
    sizes = GPTConfig(block_size=16, vocab_size=320, n_layer=1, n_head=2, n_embd=16)
    cpu = torch.device('cpu')
    sides = [make(config, sizes, cpu, 'float32') for make in (bench.our_side, bench.nanogpt_side)]
    losses = [[side.step(*batch).item() for batch, _ in zip(bench.batches(config, sizes, cpu), range(2))]
              for side in sides]
    assert abs(losses[0][0] - losses[1][0]) < 1e-5
    assert losses[0][0] != losses[0][1]


@pytest.mark.slow
def test_both_sides_learn_the_same(tmp_path):
    (tmp_path / 'model.py').write_text(STAND_IN)
    words = [w for w in TINY if 'vocab' not in w] + ['--vocab_size=320', f'--against={tmp_path}', '--part=loss', '--steps=8']
    loss = json.loads(run_script('bench.py', *words).stdout.splitlines()[-1])['loss']
    assert abs(loss['ours'] - loss['nanoGPT']) < 0.02


@pytest.mark.parametrize('device, compiled', [('cpu', False), ('cuda', True)])
def test_on_gpus_memory_is_that_of_compiled_code(monkeypatch, device, compiled):
    def run(words, **_):
        assert ('--compile=False' not in words) == compiled
        return subprocess.CompletedProcess(words, 0, '{"peak_MiB": 7}')
    monkeypatch.setattr(bench.subprocess, 'run', run)
    assert bench.memory_of('ours', 'train', torch.device(device)) == 7


@pytest.mark.slow
def test_a_wrong_path_is_one_line():
    done = run_script('bench.py', *TINY, '--against=nowhere', check=False)
    assert done.returncode == 2 and 'model.py' in done.stderr and done.stderr.count('\n') == 1


@pytest.mark.slow
def test_the_types_beside_gpt2():
    words = [*TINY, '--n_layer=2', '--part=types', '--variants=gpt2,parallel mean,duo']
    found = json.loads(run_script('bench.py', *words).stdout.splitlines()[-1])
    assert list(found['types']) == list(found['peak_MiB']) == ['gpt2', 'parallel mean', 'duo']
    assert found['types']['gpt2']['ratio'] == 1 and found['types']['duo']['ratio'] > 0
    done = run_script('bench.py', *TINY, '--part=types', '--variants=gpt3', check=False)
    assert done.returncode == 2 and 'heat adaptive' in done.stderr


def dense_two_streams(attention, x, ahead):
    """duo with all 2T-1 positions, the keys and values of the next tokens behind theirs, in one attention under a mask."""
    (B, N, C), T, H = x.shape, ahead.size(1) + 1, attention.n_head
    q, k, v = attention.c_attn(x).view(B, N, 3, H, C // H).permute(2, 0, 3, 1, 4)
    k_ahead, v_ahead = attention.look_ahead(k[:, :, :T], v[:, :, :T], ahead)
    causal, itself = torch.ones(T, T, dtype=torch.bool).tril(), torch.eye(T - 1, dtype=torch.bool)
    tokens = F.pad(causal, (0, 2 * (T - 1)))
    masks = torch.cat((causal[:T - 1].tril(-1), itself, itself), dim=1)
    k, v = torch.cat((k, k_ahead), dim=2), torch.cat((v, v_ahead), dim=2)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.cat((tokens, masks)))
    return attention.c_proj(y.transpose(1, 2).reshape(B, N, C))


@pytest.mark.parametrize('published', [False, True])
def test_duo_is_one_dense_attention_under_a_mask(published):
    sizes = GPTConfig(model_type='duo', block_size=16, vocab_size=30, n_layer=2, n_head=2, n_embd=16, published=published)
    X, Y = torch.randint(30, (2, 16)), torch.randint(30, (2, 31))
    losses = []
    for dense in (False, True):
        side = bench.type_side('duo', bench.BenchConfig(compile=False), sizes, torch.device('cpu'), 'float32')
        if dense:
            for block in side.model.transformer.h:
                block.attn.two_streams = partial(dense_two_streams, block.attn)
        loss = side.model(X, Y)[1]
        loss.backward()
        losses.append((loss.item(), [p.grad.clone() for p in side.model.parameters()]))
    assert abs(losses[0][0] - losses[1][0]) < 1e-5
    assert all(torch.allclose(mine, dense, atol=1e-5) for mine, dense in zip(losses[0][1], losses[1][1]))


@pytest.mark.slow
def test_refinement_beside_left_to_right():
    found = json.loads(run_script('bench.py', *TINY, '--part=refine', '--max_steps=2,16').stdout.splitlines()[-1])
    for streams in (1, 2):
        rows = found[f'refine_{streams}']
        assert list(rows) == ['gpt2', '2 steps', '16 steps', *(f'blocks of 4, {n} steps' for n in (1, 2, 4))]
        assert rows['2 steps']['ms_min'] < rows['16 steps']['ms_min']
