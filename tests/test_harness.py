"""nanodrift/harness.py: the answers of the harness's own model on an export, sums by hand, and bounds by enumeration."""
import itertools
import json
import math
import re

import pytest
import torch
from conftest import BLOCKS, ROOT, TASKS, TINY, local_task

import evaluate
import export
import train
from model import GPT, GPTConfig
from nanodrift.blocks import BlockTrunk
from nanodrift.machine import Ranks
from nanodrift.objectives import conditional_bound
from nanodrift.options import UserError
from nanodrift.tokenizer import ByteTokenizer

pytest.importorskip('lm_eval', reason='pip install lm_eval==0.4.13')
from lm_eval.api.instance import Instance

from nanodrift.harness import HarnessModel

NELBO = {'model_type': 'diffusion', 'diffusion_objective': 'nelbo'}
LONG = 'The drift cools the token. ' * 4


@pytest.fixture(scope='module')
def place(place):
    """The same with runs called gpt2, nelbo and drifting, and tasks that need no network."""
    for name, options in {'gpt2': {}, 'nelbo': NELBO,
                          'drifting': {'model_type': 'drifting', 'encoder': place / 'gpt2'}}.items():
        values = TINY | {'dataset': 'text_bpe280', 'data_dir': place, 'out_dir': place / name, 'max_iters': 12} | options
        assert train.main([f'--{key}={value}' for key, value in values.items()]) == 0
    for kind in TASKS:
        local_task(place, kind)
    return place


def requests(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=0) for pair in arguments]


PAIRS = [('The drift', ' cools'), ('The drift', ' flows'), ('The drift ', 'cools'), ('The drift \n', ' learns the café'),
         ('', 'The mask'), ('', '<|endoftext|>The'), ('One<|endoftext|>', 'The'), (LONG, ' And'), (LONG, LONG[:14])]


def test_the_harness_finds_the_same_of_gpt2_by_transformers(place):
    """Requests one by one: empty contexts, spaces that move to the continuation, and what is longer than block_size."""
    huggingface = pytest.importorskip('lm_eval.models.huggingface', reason='pip install lm_eval[hf]==0.4.13')
    export.main([f'--out_dir={place}/gpt2', f'--to={place}/hf'])
    theirs = huggingface.HFLM(pretrained=f'{place}/hf', device='cpu', dtype='float32', batch_size=2)
    loaded = evaluate.load(evaluate.EvalConfig(), str(place / 'gpt2'), 'cpu')
    ours = HarnessModel(loaded.model, loaded.tokenizer, batch_size=3)
    assert ours.max_length == theirs.max_length == 16 < len(ours.tok_encode(LONG))
    asked = requests('loglikelihood', *PAIRS)
    for pair, (mine, greedy), (value, right) in zip(PAIRS, ours.loglikelihood(asked), theirs.loglikelihood(asked)):
        assert mine == pytest.approx(value, abs=1e-4) and greedy == right, pair
    asked = requests('loglikelihood_rolling', *((text,) for text in ('a', LONG[:16], LONG, LONG + '<|endoftext|>')))
    assert ours.loglikelihood_rolling(asked) == pytest.approx(theirs.loglikelihood_rolling(asked), abs=1e-4)
    for until, count in ((['\n'], 10), (['e', ' t'], 10), ([], 3)):
        asked = requests('generate_until', *((text, {'until': until, 'max_gen_toks': count}) for text in ('The', LONG)))
        assert ours.generate_until(asked) == theirs.generate_until(asked)


def small(**options):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**dict(block_size=8, vocab_size=257, n_layer=2, n_head=2, n_embd=16) | options)).eval()
    for p in model.parameters():
        p.data.mul_(4)  # far from uniform
    return model


@pytest.mark.parametrize('options', [{'model_type': kind} for kind in ('gpt2', 'dd', 'heat', 'rotating', 'parallel', 'duo')]
                         + [{'heat_t': 'adaptive', 'model_type': 'heat'}, {'draft_block': 2}], ids=str)
@torch.no_grad()
def test_a_likelihood_is_the_sum_by_hand(options):
    """Of the last block_size + 1 tokens, whatever else is in the batch."""
    model, eot = small(**options), [256]
    cases = [('ab', 'cde', b'ab', b'cde'), ('', 'cde', eot, b'cde'), ('a long context', ' cde', b'ntext', b' cde'),
             ('ab', '12345678', b'b', b'12345678'), ('ab \n', 'c', b'ab', b' \nc'), ('  ', 'c', eot, b'  c')]
    asked = requests('loglikelihood', *(case[:2] for case in cases))
    answers = HarnessModel(model, ByteTokenizer(), batch_size=4).loglikelihood(asked)
    for (*_, given, scored), (value, greedy) in zip(cases, answers):
        ids, n = torch.tensor([[*given, *scored]]), len(scored)
        log_p = model(ids[:, :-1], ids[:, 1:])[0][0, -n:].log_softmax(-1)
        assert value == pytest.approx(sum(float(row[token]) for row, token in zip(log_p, scored)), abs=1e-4)
        assert greedy == (log_p.argmax(-1).tolist() == list(scored))


def test_a_continuation_that_does_not_fit_is_one_line():
    for options in ({}, NELBO):
        with pytest.raises(UserError, match='continuation of 9 tokens'):
            HarnessModel(small(**options), ByteTokenizer()).loglikelihood(requests('loglikelihood', ('a', '123456789')))


def cross_entropies(model, given, block):
    """{positions masked: their cross entropy} of each way to mask block (n,) after ids given (P,), by the passes of
    generation."""
    n, mask, found = len(block), model.config.vocab_size, {}
    N, start = model.config.diffusion_block, len(given)
    if N:  # what is given in the same block is part of it
        start -= (start - model.config.diffusion_shift) % N
    for masked in itertools.chain(*(itertools.combinations(range(n), count) for count in range(1, n + 1))):
        ids = torch.cat((given, torch.tensor([mask if i in masked else int(t) for i, t in enumerate(block)])))[None]
        if N:
            trunk = BlockTrunk(model, 1)
            trunk.begin(ids[:, :start])
            x = trunk(ids[:, start:], torch.tensor([True]))[0, len(given) - start:]
        else:
            x = model.trunk(ids)[0, len(given):]
        log_p = model.head(x)[:, :mask].float().log_softmax(-1)
        found[masked] = -sum(float(log_p[i, block[i]]) for i in masked)
    return found


def enumerated_bound(model, context, continuation):
    """The mean over l of the mean, over all ways to mask l of n tokens, of n / l times their cross entropy; the sum over
    blocks."""
    N, P, total = model.config.diffusion_block, len(context), 0.0
    text, end = torch.cat((context, continuation)), len(context) + len(continuation)
    while P < end:
        upto = min(end, P + N - (P - model.config.diffusion_shift) % N) if N else end
        n, found = upto - P, cross_entropies(model, text[:P], text[P:upto])
        total += sum(value / len(masked) / math.comb(n, len(masked)) for masked, value in found.items())
        P = upto
    return total


@pytest.mark.parametrize('options', [NELBO, {'model_type': 'diffusion'}, BLOCKS, BLOCKS | {'diffusion_shift': True},
                                     NELBO | {'positions': 'learned'}], ids=str)
@torch.no_grad()
def test_a_bound_is_that_of_all_masks_given_the_context(options):
    model, rng = small(**options), torch.Generator().manual_seed(1)
    for P, n in ((1, 1), (2, 3), (4, 3), (5, 3), (1, 7)):
        text = torch.randint(257, (P + n,), generator=rng)
        nats = conditional_bound(model, text[:P], text[P:], 4000, rng)
        error = 5 * float(nats.std()) / len(nats) ** 0.5 + 1e-4
        assert float(nats.mean()) == pytest.approx(enumerated_bound(model, text[:P], text[P:]), abs=error), (P, n)


@torch.no_grad()
def written_by_hand(model, context, n):
    """The argmax of the most confident position, one after the other."""
    mask = model.config.vocab_size
    ids = torch.tensor([[*context, *[mask] * n]])
    while (ids == mask).any():
        confidence, guess = model.head(model.trunk(ids))[..., :mask].softmax(-1).max(-1)
        i = int(confidence[0].masked_fill(ids[0] != mask, -1).argmax())
        ids[0, i] = guess[0, i]
    return ids[0, -n:].tolist()


def test_what_diffusion_would_write_is_greedy():
    model = small(**NELBO)
    own = written_by_hand(model, b'ab', 5)
    asked = [(None, [97, 98], own)] + [(None, [97, 98], [*own[:i], (own[i] + 1) % 257, *own[i + 1:]]) for i in range(5)]
    answers = HarnessModel(model, ByteTokenizer(), draws=2)._loglikelihood_tokens(asked)
    assert [greedy for _, greedy in answers] == [True] + [False] * 5


def test_masks_depend_on_the_seed_and_the_request_alone(monkeypatch):
    asked = [(None, [97], [98, 99]), (None, [96], [98, 99]), (None, [97], [98, 100])]
    seeds, model = [], small(**NELBO)
    monkeypatch.setattr('nanodrift.harness.conditional_bound', lambda *args: seeds.append(
        args[-1].initial_seed()) or conditional_bound(*args))
    first, again, other = (HarnessModel(model, ByteTokenizer(), draws=4, seed=seed) for seed in (1, 1, 2))
    answers = first._loglikelihood_tokens(asked)
    assert len(set(seeds)) == 3
    assert again._loglikelihood_tokens(asked[::-1]) == answers[::-1]
    assert other._loglikelihood_tokens(asked) != answers


@pytest.mark.parametrize('settings', [{'max_gen_toks': 3}, {'max_gen_toks': 20}, {'max_gen_toks': 5, 'until': 'xyz'},
                                      {'max_gen_toks': 3, 'do_sample': True, 'temperature': 5.0, 'top_k': 9}], ids=str)
def test_generated_text_follows_as_much_context_as_leaves_it_room(settings):
    """In a context of 8 positions; where there is no room, the window slides. A stop string is left out."""
    model, count = small(), settings['max_gen_toks']
    found, = HarnessModel(model, ByteTokenizer()).generate_until(requests('generate_until', ('0123456789', settings)))
    given = torch.tensor([list(b'0123456789')[-(8 - count if count < 8 else 8):]])
    greedy = [int(column) for column in model.generate(given, count, temperature=0)]
    text = ByteTokenizer().decode(greedy)
    assert (found == text) == ('do_sample' not in settings)
    stop = text[1:3]
    again, = HarnessModel(model, ByteTokenizer()).generate_until(requests('generate_until', (
        '0123456789', {'max_gen_toks': count, 'until': ['\0none', stop]})))
    assert again == text[:text.find(stop)]


def test_tasks_of_all_kinds(place, capsys):
    def go(*args):
        tasks = ','.join(f'{place}/{kind}.yaml' for kind in ('multiple_choice', 'loglikelihood_rolling'))
        evaluate.main([f'--tasks={tasks}', '--device=cpu', '--dtype=float32', *args])
        out = capsys.readouterr().out
        return out, json.loads(out.splitlines()[-1])['tasks']
    names = [f'{place}/{name}' for name in ('gpt2', 'nelbo', 'drifting')]
    out, found = go(f'--out_dir={",".join(names)}')
    assert list(found) == names[:2] and f'{names[2]} (drifting) has no likelihood' in out
    assert out.count('upper bound') == 1 and '32 draws' in out and '|multiple_choice' in out
    assert not found[names[0]]['bound'] and found[names[1]]['bound'] and found[names[1]]['draws'] == 32
    loaded = evaluate.load(evaluate.EvalConfig(), names[0], 'cpu')
    model = HarnessModel(loaded.model, loaded.tokenizer)
    scores = [[v for v, _ in model.loglikelihood(requests('loglikelihood', *((q, f' {c}') for c in choices)))]
              for q, choices in (('The token', ('drifts', 'cools')), ('Heat', ('flows', 'a')))]
    right = [row[0] > row[1] for row in scores]
    results = found[names[0]]['results']
    assert results['multiple_choice']['acc,none'] == (right[0] + (not right[1])) / 2
    total = sum(model.loglikelihood_rolling(requests('loglikelihood_rolling', ('The token',), ('Heat ',))))
    assert results['loglikelihood_rolling']['word_perplexity,none'] == pytest.approx(math.exp(-total / 4), rel=1e-4)
    few = go(f'--out_dir={names[1]}', '--draws=3', '--seed=5', '--limit=1', '--num_fewshot=0')[1][names[1]]
    assert (few['draws'], few['seed'], few['results']['multiple_choice']['sample_len']) == (3, 5, 1)


@pytest.mark.parametrize('run, task, message', [
    ('nelbo', 'generate_until.yaml', 'for causal types'), ('gpt2', 'no.yaml', 'no such file'),
    ('gpt2', 'docs.jsonl', 'cannot be loaded')])
def test_mistakes_are_one_line(place, run, task, message):
    with pytest.raises(UserError, match=message) as found:
        evaluate.main([f'--out_dir={place}/{run}', f'--tasks={place}/{task}', '--device=cpu'])
    assert '\n' not in str(found.value)


def test_several_ranks_are_one_line(place):
    with pytest.raises(UserError, match='one process'):
        evaluate.evaluate_tasks(evaluate.EvalConfig(out_dir=f'{place}/gpt2', tasks='x'), Ranks(world_size=2))


def test_the_documented_lines_of_python_run(place, monkeypatch):
    with open(f'{ROOT}/docs/ecosystem.md', encoding='utf-8') as f:
        code, = re.findall(r'^```python\n(.*?)^```', f.read(), re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(place)
    code = code.replace("'out'", "'gpt2'").replace("'arc_easy'", "'multiple_choice.yaml'")
    exec(compile(code, 'ecosystem.md', 'exec'), {})
