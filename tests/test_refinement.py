"""The samplers of masked diffusion, on sources that can be enumerated and against slow versions of themselves."""
import itertools
import math
from collections import Counter

import pytest
import torch

from model import GPT, GPTConfig
from nanodrift.options import UserError
from nanodrift.refinement import ORDERS, REMASKS, Canvas, RefineConfig, check_defined, refine
from nanodrift.sampling import gumbel_draw, keep_likely

STRATEGIES = [s for s in ORDERS if s != 'naive']
REMDM = [r for r in REMASKS if r.startswith('remdm')]
PAIRS = [(s, 'none') for s in STRATEGIES] + [(s, 'flag') for s in STRATEGIES] + [('ancestral', r) for r in REMDM]


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(model_type='diffusion', block_size=16, vocab_size=7, n_layer=1, n_head=2, n_embd=16)).eval()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(40)  # opinions
    return model


def run(model, ids, config, seed=0, use_cache=True):
    rng = torch.Generator().manual_seed(seed)
    return list(refine(model.trunk, model.head, ids, model.config.vocab_size, config, rng, use_cache))


def open_canvas(rows=3, length=12, mask=7):
    return torch.full((rows, length), mask)


def config_of(strategy, remask='none', **options):
    return RefineConfig(**dict(strategy=strategy, remask=remask, max_steps=5, temperature=1.0, top_k=0) | options)


# ---------------------------------------------------------------------------------------------------------------------
# what holds for every strategy

def test_the_strategies_and_what_is_opened_again_are_those_documented():
    assert list(ORDERS) == ['naive', 'ancestral', 'confidence', 'entropy', 'margin', 'random', 'threshold']
    assert list(REMASKS) == ['none', 'flag', 'remdm-cap', 'remdm-rescale', 'remdm-conf', 'remdm-loop']
    assert [name for name, remask in REMASKS.items() if remask.compensated] == REMDM
    assert {r: REMASKS[r].eta for r in REMDM} == {'remdm-cap': 0.04, 'remdm-rescale': 0.015, 'remdm-conf': 1.0,
                                                  'remdm-loop': 0.02}  # as published


@pytest.mark.parametrize('strategy, remask', PAIRS)
@pytest.mark.parametrize('block_length', [0, 3])
def test_given_tokens_stay_and_nothing_is_left_open(model, strategy, remask, block_length):
    ids = open_canvas()
    ids[:, :2] = torch.tensor([3, 6])
    ids[:, 6] = 0
    eta = 0.3 if 'remdm' in remask else -1
    config = config_of(strategy, remask, block_length=block_length, flag_threshold=0.05, eta=eta)
    for seed in range(3):
        end = run(model, ids, config, seed)[-1].ids
        fixed = ids != 7
        assert (end[fixed] == ids[fixed]).all()
        assert end.max() < 7 and end.min() >= 0


@pytest.mark.parametrize('strategy, remask', PAIRS)
def test_a_row_that_has_not_changed_need_not_be_run_again(model, strategy, remask):
    config = config_of(strategy, remask, max_steps=40, flag_threshold=0.2)
    cached, uncached = (run(model, open_canvas(), config, 1, use_cache) for use_cache in (True, False))
    assert [s.ids.tolist() for s in cached] == [s.ids.tolist() for s in uncached]
    assert (cached[-1].passes <= uncached[-1].passes).all()
    if strategy == 'ancestral':
        assert (cached[-1].passes < 40).all()


@pytest.mark.parametrize('strategy, remask', PAIRS)
def test_one_block_is_no_blocks(model, strategy, remask):
    config = config_of(strategy, remask)
    whole, one = (run(model, open_canvas(), config_of(strategy, remask, block_length=n), 2) for n in (0, 12))
    assert [s.ids.tolist() for s in whole] == [s.ids.tolist() for s in one], config


@pytest.mark.parametrize('strategy', [s for s in STRATEGIES if s != 'ancestral'])
def test_blocks_of_one_greedily_go_from_left_to_right(model, strategy):
    ids = open_canvas(rows=1)
    ids[0, 4] = 2
    steps = run(model, ids, config_of(strategy, block_length=1, max_steps=1, temperature=0))
    for position in (ids[0] == 7).nonzero().flatten().tolist():
        with torch.no_grad():
            ids[0, position] = model(ids)[0][0, position, :7].argmax()
    assert steps[-1].ids.tolist() == ids.tolist() and len(steps) == 11


@pytest.mark.parametrize('strategy', ['confidence', 'entropy', 'margin', 'random'])
@pytest.mark.parametrize('count', [1, 4, 5, 7, 12, 30])
def test_an_order_of_equal_shares_commits_exactly_the_canvas(model, strategy, count):
    steps = run(model, open_canvas(), config_of(strategy, max_steps=count))
    open_after = [12] + [int((s.ids[0] == 7).sum()) for s in steps]
    committed = [a - b for a, b in zip(open_after, open_after[1:])]
    assert committed == [12 // count + (i < 12 % count) for i in range(min(count, 12))]
    assert int(steps[-1].passes[0]) == len(steps)


def test_steps_are_shared_by_the_blocks(model):
    steps = run(model, open_canvas(), config_of('confidence', block_length=4, max_steps=7))
    left = [[int((s.ids[0, i:i + 4] == 7).sum()) for i in (0, 4, 8)] for s in steps]
    assert left == [[2, 4, 4], [1, 4, 4], [0, 4, 4], [0, 2, 4], [0, 0, 4], [0, 0, 2], [0, 0, 0]]
    assert len(run(model, open_canvas(), config_of('confidence', block_length=2, max_steps=2))) == 6  # one each at least


def test_a_threshold_above_one_commits_one_token_a_step_and_of_zero_a_block_a_step(model):
    assert len(run(model, open_canvas(), config_of('threshold', threshold=1.01))) == 12
    assert len(run(model, open_canvas(), config_of('threshold', threshold=0.0))) == 1
    assert len(run(model, open_canvas(), config_of('threshold', threshold=0.0, block_length=4))) == 3


@pytest.mark.parametrize('remask', ['remdm-cap', 'remdm-rescale', 'remdm-conf'])
def test_remdm_without_sigma_is_ancestral(model, remask):
    plain = run(model, open_canvas(), config_of('ancestral', max_steps=9), 4)
    remdm = run(model, open_canvas(), config_of('ancestral', remask, max_steps=9, eta=0), 4)
    assert [s.ids.tolist() for s in plain] == [s.ids.tolist() for s in remdm][:len(plain)]
    assert remdm[-1].ids.tolist() == plain[-1].ids.tolist()


@pytest.mark.parametrize('remask', REMDM)
def test_remdm_opens_tokens_again(model, remask):
    steps = run(model, open_canvas(30), config_of('ancestral', remask, max_steps=40, eta=max(REMASKS[remask].eta, 0.3)))
    assert sum(int(s.revised.sum()) for s in steps) > 10
    assert not steps[-1].revised.any()


def test_remdm_loop_without_eta_stands_still_between_its_phases(model):
    steps = run(model, open_canvas(200), config_of('ancestral', 'remdm-loop', max_steps=20, eta=0))
    filled = [float((s.ids != 7).double().mean()) for s in steps]
    assert len(steps) == 20 and len(set(filled[8:19])) == 1 and filled[-1] == 1
    assert filled[:9] == pytest.approx([0.1 * n for n in range(1, 10)], abs=0.03)  # t = 0.95, 0.9, ... 0.55: MDLM, faster


def test_opening_by_remdm_is_as_frequent_as_sigma_says():
    """A model that predicts one token, so that only the masking is random: the share that is open at time s is s, whatever
    sigma."""
    def trunk(ids):
        return torch.zeros(*ids.shape, 3, dtype=torch.float64)
    for remask, eta in (('remdm-cap', 0.2), ('remdm-rescale', 0.5)):  # remdm-conf, as published, leaves more of it open
        config = config_of('ancestral', remask, max_steps=10, eta=eta)
        steps = list(refine(trunk, lambda x: x, open_canvas(400, 50, mask=2), 2, config, torch.Generator().manual_seed(0)))
        for number, step in enumerate(steps):
            assert float((step.ids == 2).double().mean()) == pytest.approx(1 - (number + 1) / 10, abs=0.015)


def remdm(remask, t, s, confidence, committed, eta):
    """alpha_t, alpha_s and sigma (B, T) of ReMDM from time t to s, for tokens committed with these confidences (B, T)."""
    rule, canvas = REMASKS[remask], Canvas(None, None, torch.zeros_like(committed, dtype=torch.long), 7)
    canvas.confidence = confidence
    alpha_t, alpha_s = rule.alphas(t), rule.alphas(s)
    config = config_of('ancestral', remask, eta=eta)
    return alpha_t, alpha_s, rule.probability(canvas, committed, config, t, s, alpha_t, alpha_s, eta)


def test_sigma_is_that_of_the_published_formulas():
    confidence = torch.tensor([[0.2, 0.9, 0.5, 0.0]], dtype=torch.float64)
    committed = torch.tensor([[True, True, True, False]])

    def of(remask, eta, t, s):
        return remdm(remask, t, s, confidence, committed, eta)
    assert of('remdm-cap', 0.3, 0.6, 0.5)[2][0].tolist() == [0.3] * 4
    assert of('remdm-cap', 0.3, 0.1, 0.0)[2].max() == 0
    assert of('remdm-rescale', 0.3, 0.2, 0.1)[2][0].tolist() == pytest.approx([0.3 * 0.1 / 0.8] * 4)
    assert of('remdm-rescale', 0.3, 0.9, 0.8)[2][0].tolist() == pytest.approx([0.3] * 4)  # (1 - alpha_s) / alpha_t above 1
    weights = torch.tensor([-0.2, -0.9, -0.5], dtype=torch.float64).exp()
    expected = [*(0.125 * weights / weights.sum()).tolist(), 0.0]
    assert of('remdm-conf', 1.0, 0.2, 0.1)[2][0].tolist() == pytest.approx(expected)
    assert of('remdm-conf', 0.5, 0.2, 0.1)[2][0].tolist() == pytest.approx([e / 2 for e in expected])
    for t, s, alpha_t, alpha_s, sigma in ((0.775, 0.6625, 0.45, 0.675, 0), (0.5, 0.4, 0.9, 0.9, 0.1 / 0.9),
                                          (0.05, 0.0, 0.9, 1.0, 0)):
        *alphas, reopened = of('remdm-loop', 0.3, t, s)
        assert alphas == pytest.approx([alpha_t, alpha_s]) and reopened.max().item() == pytest.approx(sigma)
    assert of('remdm-loop', 0.02, 0.5, 0.4)[2].max().item() == pytest.approx(0.02)
    assert of('remdm-cap', 0.3, 0.6, 0.5)[:2] == pytest.approx((0.4, 0.5))


@pytest.mark.parametrize('remask', REMDM)
def test_a_negative_eta_is_what_was_published(model, remask):
    published, given = (run(model, open_canvas(20), config_of('ancestral', remask, max_steps=20, eta=eta))
                        for eta in (-1, REMASKS[remask].eta))
    assert [s.ids.tolist() for s in published] == [s.ids.tolist() for s in given]


@pytest.mark.parametrize('remask, eta', [('remdm-cap', 0.2), ('remdm-rescale', 0.5), ('remdm-loop', 0.1)])
def test_committed_tokens_are_opened_as_often_as_sigma_says_and_forget_their_confidence(remask, eta):
    def trunk(ids):
        return torch.tensor([0.0, 0.0, -math.inf], dtype=torch.float64).expand(*ids.shape, 3)
    config = config_of('ancestral', remask, max_steps=10, eta=eta)
    steps = list(refine(trunk, lambda x: x, open_canvas(400, 50, mask=2), 2, config, torch.Generator().manual_seed(0)))
    for number, (before, after) in enumerate(zip(steps, steps[1:]), start=1):
        committed = before.ids != 2
        wanted = remdm(remask, 1 - number / 10, 1 - (number + 1) / 10, before.confidence, committed, eta)[2].max().item()
        share = float(after.revised.sum() / committed.sum())
        assert share == pytest.approx(wanted, abs=0.02)
        assert (after.confidence[after.revised] == 0).all() and (after.confidence[after.ids != 2] == 0.5).all()


# ---------------------------------------------------------------------------------------------------------------------
# flags

def flagging(wrong, sure=30.0):
    """A model that predicts [MASK] (= 4) for the token `wrong` and else fills in position mod 3, with 3 at odds."""
    def trunk(ids):
        logits = torch.zeros(*ids.shape, 5, dtype=torch.float64)
        logits.scatter_(2, torch.where(ids == 4, torch.arange(ids.size(1)) % 3, ids)[..., None], 2.0)
        logits[..., 3][ids == 4] = 2.0
        logits[..., 4][ids == wrong] = sure
        logits[..., 4][ids == 4] = -sure
        return logits
    return trunk


def test_what_the_model_flags_is_written_anew_but_not_in_the_last_step():
    rng = torch.Generator().manual_seed(0)
    canvas = open_canvas(50, 9, mask=4)
    plain = list(refine(flagging(3), lambda x: x, canvas, 4, config_of('random', max_steps=9), rng))
    flag = list(refine(flagging(3), lambda x: x, canvas, 4, config_of('random', 'flag', max_steps=30), rng))
    assert (plain[-1].ids == 3).double().mean() > 0.3
    assert (flag[-1].ids == 3).double().mean() < 0.1
    assert any(s.revised.any() for s in flag) and not flag[-1].revised.any()
    for before, after in zip(flag, flag[1:]):
        assert (before.ids[after.revised] == 3).all()
    unsure = config_of('random', 'flag', max_steps=30, flag_threshold=1.0)
    assert not any(s.revised.any() for s in refine(flagging(3), lambda x: x, canvas, 4, unsure, rng))


def test_a_token_is_flagged_above_the_threshold_whatever_the_temperature():
    """Where the token 3 stands, p([MASK]) is 0.6."""
    def trunk(ids):
        p = torch.full((*ids.shape, 5), 0.1, dtype=torch.float64)
        p[..., 3] += 5.0 * (ids == 4)  # what is open becomes 3
        p[..., 4] = torch.where(ids == 3, 0.6, 1e-9)
        return p.log()
    for threshold, opened in ((0.59, True), (0.61, False)):
        for temperature in (0.1, 1.0):
            config = config_of('random', 'flag', max_steps=4, flag_threshold=threshold, temperature=temperature)
            steps = list(refine(trunk, lambda x: x, open_canvas(20, 4, mask=4), 4, config, torch.Generator().manual_seed(0)))
            assert any(s.revised.any() for s in steps) == opened


@pytest.mark.parametrize('strategy', [s for s in STRATEGIES if s != 'threshold'])
def test_no_more_steps_are_taken_than_allowed_even_where_all_is_flagged(strategy):
    def trunk(ids):
        return torch.where(torch.arange(5) == 4, 5.0, 0.0).expand(*ids.shape, 5).double()
    config = config_of(strategy, 'flag', max_steps=6)
    steps = list(refine(trunk, lambda x: x, open_canvas(5, 8, mask=4), 4, config, torch.Generator().manual_seed(0)))
    assert len(steps) == 6 and int(steps[-1].passes.max()) <= 6
    assert any(s.revised.any() for s in steps) and not steps[-1].revised.any()


def test_flags_stop_when_nothing_changes_any_more():
    rng = torch.Generator().manual_seed(0)
    config = config_of('entropy', 'flag', max_steps=500)
    steps = list(refine(flagging(None), lambda x: x, open_canvas(4, 3, mask=4), 4, config, rng))
    assert len(steps) == 4 and int(steps[-1].passes.max()) == 4


def test_a_given_token_is_never_opened():
    ids = open_canvas(2, 6, mask=4)
    ids[:, 2] = 3
    steps = list(refine(flagging(3), lambda x: x, ids, 4, config_of('confidence', 'flag', max_steps=20, temperature=0)))
    assert all((s.ids[:, 2] == 3).all() for s in steps)


# ---------------------------------------------------------------------------------------------------------------------
# an oracle: the true conditional distributions of a source that can be enumerated

class Oracle:
    """Of a joint distribution over T symbols out of V: for every canvas the marginals of what is open, given the rest."""

    def __init__(self, joint):
        self.joint = joint.double()  # (V,) * T
        self.V, self.T = joint.size(0), joint.dim()
        self.words = torch.tensor(list(itertools.product(range(self.V), repeat=self.T)))

    def trunk(self, ids):
        p = self.joint.flatten()
        rows = []
        for row in ids:
            given = row != self.V
            p_row = p * (self.words[:, given] == row[given]).all(1)
            one_hot = torch.nn.functional.one_hot(self.words, self.V).double()  # (words, T, V)
            rows.append(torch.einsum('w,wtv->tv', p_row, one_hot) / p_row.sum())
        return torch.nn.functional.pad(torch.stack(rows).log(), (0, 1), value=-math.inf)

    def sample(self, config, count=4000, seed=0):
        """Frequencies of words among `count` samples, (V,) * T."""
        ids = torch.full((count, self.T), self.V)
        *_, last = refine(self.trunk, lambda x: x, ids, self.V, config, torch.Generator().manual_seed(seed))
        counts = Counter(map(tuple, last.ids.tolist()))
        return torch.tensor([counts[tuple(w)] for w in self.words.tolist()]).view(self.joint.shape) / count


@pytest.fixture(scope='module')
def markov():
    start = torch.tensor([0.6, 0.3, 0.1])
    follow = torch.tensor([[0.1, 0.8, 0.1], [0.2, 0.1, 0.7], [0.9, 0.05, 0.05]])
    return Oracle(torch.einsum('a,ab,bc->abc', start, follow, follow))


def total_variation(frequencies, joint):
    return float((frequencies - joint).abs().sum() / 2)


ONE_A_STEP = [config_of(s, max_steps=3) for s in ('random', 'entropy', 'margin')] + \
    [config_of(s, max_steps=3, block_length=1) for s in STRATEGIES]


@pytest.mark.parametrize('config', ONE_A_STEP, ids=lambda c: f'{c.strategy}-{c.block_length}')
def test_one_commit_a_step_reproduces_the_joint(markov, config):
    assert total_variation(markov.sample(config), markov.joint) < 0.035  # noise alone: about 0.02


def test_ancestral_converges_to_the_joint_and_does_not_in_one_step(markov):
    assert total_variation(markov.sample(config_of('ancestral', max_steps=64)), markov.joint) < 0.05
    at_once = markov.sample(config_of('ancestral', max_steps=1))
    assert total_variation(at_once, markov.joint) > 0.3
    marginals = torch.einsum('abc->a', markov.joint), torch.einsum('abc->b', markov.joint), markov.joint.sum((0, 1))
    assert total_variation(at_once, torch.einsum('a,b,c->abc', *marginals)) < 0.035


@pytest.mark.slow
@pytest.mark.parametrize('remask', REMDM)
def test_remdm_converges_to_the_joint(markov, remask):
    assert total_variation(markov.sample(config_of('ancestral', remask, max_steps=64)), markov.joint) < 0.06


@pytest.mark.parametrize('strategy', ['confidence', 'threshold'])
def test_ranking_by_the_drawn_token_is_biased(strategy):
    """Two independent bits: a draw of the unlikely value is put off, and drawn again."""
    bits = Oracle(torch.outer(torch.tensor([0.1, 0.9]), torch.tensor([0.4, 0.6])))
    sampled = bits.sample(config_of(strategy, max_steps=2, **({'threshold': 1.01} if strategy == 'threshold' else {})))
    assert float(sampled[1].sum()) == pytest.approx(0.990, abs=0.006)
    assert float(sampled[:, 1].sum()) == pytest.approx(0.6, abs=0.03)
    assert total_variation(bits.sample(config_of('entropy', max_steps=2)), bits.joint) < 0.03


def known(*rows):
    """A model whose probabilities at the positions are these rows, whatever the canvas."""
    p = torch.tensor([[*row, 0.0] for row in rows], dtype=torch.float64).log()
    return lambda ids: p.expand(len(ids), -1, -1)


@pytest.mark.parametrize('strategy, order', [('confidence', [1, 2, 0]), ('entropy', [1, 0, 2]), ('margin', [1, 2, 0])])
def test_the_most_confident_is_committed_first(strategy, order):
    """Position 2 leads by more than position 0, but its rest is spread wider."""
    trunk = known([0.5, 0.5, 0.0, 0.0], [0.97, 0.01, 0.01, 0.01], [0.55, 0.15, 0.15, 0.15])
    config = config_of(strategy, max_steps=3, temperature=0)
    steps = list(refine(trunk, lambda x: x, open_canvas(1, 3, mask=4), 4, config))
    opened = [set((s.ids[0] != 4).nonzero().flatten().tolist()) for s in steps]
    assert [opened[0], opened[1] - opened[0], opened[2] - opened[1]] == [{position} for position in order]


def test_the_threshold_decides():
    trunk = known([0.6, 0.4], [0.45, 0.55], [0.9, 0.1])
    for value, first in ((0.5, {0, 1, 2}), (0.58, {0, 2}), (0.7, {2}), (0.95, {2})):
        config = config_of('threshold', threshold=value, temperature=0)
        step = next(refine(trunk, lambda x: x, open_canvas(1, 3, mask=2), 2, config))
        assert set((step.ids[0] != 2).nonzero().flatten().tolist()) == first


@pytest.mark.parametrize('strategy', ['confidence', 'entropy', 'threshold'])
@pytest.mark.parametrize('block_length', [0, 2])
def test_rows_that_differ_are_refined_as_each_alone(model, strategy, block_length):
    """As many are open in each, at different positions."""
    ids = open_canvas(3)
    ids[0, :6] = torch.tensor([1, 2, 3, 4, 5, 6])
    ids[1, 6:] = 0
    ids[2, ::2] = 3
    config = config_of(strategy, block_length=block_length, max_steps=6, temperature=0)
    together = run(model, ids, config)[-1]
    for i in range(3):
        alone = run(model, ids[i:i + 1], config)[-1]
        assert torch.equal(alone.ids[0], together.ids[i]) and alone.passes[0] == together.passes[i]


# ---------------------------------------------------------------------------------------------------------------------
# drawing

def test_draws_have_the_probabilities_of_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]], dtype=torch.float64).repeat(40000, 1)
    for temperature in (1.0, 0.5):
        ids = gumbel_draw(logits, temperature, rng=torch.Generator().manual_seed(0))
        frequencies = ids.bincount(minlength=4) / len(ids)
        assert torch.allclose(frequencies.double(), (logits[0] / temperature).softmax(-1), atol=0.01)
    assert gumbel_draw(logits, 0).unique().tolist() == [2] == gumbel_draw(logits, 1e-310).unique().tolist()
    assert gumbel_draw(logits, 1.0, top_k=2).unique().tolist() == [1, 2]
    assert gumbel_draw(logits, 1.0, top_p=0.5).unique().tolist() == [2]


@pytest.mark.parametrize('options, likely', [({}, 7), (dict(top_k=2), 2), (dict(top_p=0.3), 1), (dict(temperature=0), 1)])
def test_a_canvas_draws_as_its_config_says(options, likely):
    """Probabilities 2^-1, 2^-2, ... of the tokens 0, 1, ... at every position."""
    trunk, config = known([2.0 ** -n for n in (1, 2, 3, 4, 5, 6, 6)]), config_of('random', **options | {'max_steps': 1})
    (step,) = refine(trunk, lambda x: x, open_canvas(4000, 1), 7, config, torch.Generator().manual_seed(0))
    assert step.ids.unique().tolist() == list(range(likely))


@pytest.mark.parametrize('u, logit, taken', [(1 - 2 ** -40, -27, 1), (1 - 2 ** -40, -29, 0), (1.0, -36, 1), (0.0, 0, 0)])
def test_the_tail_is_not_cut(monkeypatch, u, logit, taken):
    """The noise of 1 - 2^-40 is 27.7; in float32 that is 1, and its noise at most 16.6. Neither 0 nor 1 is a NaN."""
    def rand(shape, generator=None, dtype=torch.float32, device=None):
        numbers = torch.full(shape, math.exp(-1), dtype=torch.float64)  # whose noise is 0
        numbers[:, 1] = u
        return numbers.to(dtype)
    monkeypatch.setattr(torch, 'rand', rand)
    logits = torch.tensor([[0.0, logit]], dtype=torch.float64)
    assert gumbel_draw(logits, 1.0).tolist() == [taken]


def test_bfloat16_stops_at_the_head(model):
    """What tokens are drawn from is not rounded, whatever type the blocks ran in."""
    ids = open_canvas(2)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        x = model.trunk(ids)
        (logits,) = Canvas(lambda ids, rows: model.trunk(ids[rows]), model.head, ids, 7).logits(ids == 7)
        rounded = model.head(x).double().flatten(0, 1)
    expected = x.float().flatten(0, 1) @ model.lm_head.weight[:8].float().T
    assert torch.allclose(logits, expected.double(), rtol=1e-5, atol=1e-5) and logits.dtype == torch.float64
    assert not torch.allclose(logits, rounded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('strategy, remask', [('random', 'none'), ('ancestral', 'none'), ('confidence', 'none'),
                                              ('confidence', 'flag'), ('ancestral', 'remdm-cap')])
def test_no_more_is_computed_than_is_used(model, strategy, remask):
    """The rows that go through the trunk are those that are counted; the head sees what may be committed, and with flags
    what was."""
    rows, predictions = 0, [0]

    def trunk(ids):
        nonlocal rows
        rows += len(ids)
        return model.trunk(ids)

    def head(x):
        predictions[-1] += len(x)
        return model.head(x)
    ids, rng = open_canvas(4), torch.Generator().manual_seed(0)
    config = config_of(strategy, remask, max_steps=20, flag_threshold=0.2)
    before, changes = ids, []
    for step in refine(trunk, head, ids, 7, config, rng):
        changes.append((before, step.ids))
        before = step.ids
        predictions.append(0)
    assert rows == int(step.passes.sum()) and (strategy != 'ancestral' or rows < 4 * len(changes))
    for (was, now), seen in zip(changes, predictions):
        if strategy == 'confidence':
            assert seen <= int((was == 7).sum()) + int((was != 7).sum()) * (remask == 'flag')
        else:
            assert seen == int(((was == 7) & (now != 7)).sum())  # random positions first, then predictions for them alone


def test_top_p_keeps_the_token_that_crosses_it():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
    kept = [keep_likely(logits, 0, p).isfinite().sum().item() for p in (0.4, 0.49, 0.6, 0.79, 0.81, 1.0)]
    assert kept == [1, 1, 2, 2, 3, 4]
    assert keep_likely(logits, 3, 1.0).isfinite().tolist() == [[True, True, True, False]]


def test_confidence_is_that_of_the_model_whatever_the_temperature(model):
    steps = run(model, open_canvas(1), config_of('confidence', max_steps=1, temperature=0.01))
    with torch.no_grad():
        p = model(open_canvas(1))[0][0, :, :7].double().softmax(-1)
    assert torch.allclose(steps[0].confidence[0], p.gather(1, steps[0].ids[0][:, None]).squeeze(1), atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# by way of the model, and mistakes

def test_the_model_refines_reproducibly(model):
    canvas = open_canvas(2)
    assert model.generate_diffusion(canvas, 6, 1.0, 5, seed=3).tolist() == model.generate_diffusion(canvas, 6, 1.0, 5,
                                                                                                    seed=3).tolist()
    ids = model.generate_diffusion(canvas, max_steps=6, temperature=1.0, top_k=5, strategy='threshold', threshold=0.5)
    assert ids.max() < 7 and not ids.is_inference()


def test_inference_mode_is_that_of_the_steps_alone(model):
    """Between two steps the caller is as it was, with gradients if it had them."""
    inside = []

    def trunk(ids):
        inside.append(torch.is_inference_mode_enabled())
        return model.trunk(ids)
    for _ in refine(trunk, model.head, open_canvas(1), 7, config_of('confidence')):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert inside == [True] * 5


@pytest.mark.parametrize('options, words', [
    (dict(strategy='remdm'), 'ancestral'), (dict(remask='flags'), 'remdm-loop'), (dict(max_steps=0), 'max_steps'),
    (dict(strategy='random', remask='remdm-cap'), 'ancestral'), (dict(strategy='naive', remask='flag'), 'naive'),
    (dict(top_p=0), 'top_p'),
    (dict(strategy='ancestral', remask='remdm-cap', eta=1.5), 'eta'),
    (dict(eta=0.5), 'remdm'), (dict(temperature=-1), 'temperature'),
])
def test_contradictions_are_named(options, words):
    with pytest.raises(UserError, match=words):
        RefineConfig(**options)


def test_what_is_not_defined_for_a_model_is_refused():
    sizes = dict(block_size=8, vocab_size=7, n_layer=1, n_head=2, n_embd=16)
    bound = GPT(GPTConfig(model_type='diffusion', diffusion_objective='nelbo', **sizes))
    for options in (dict(strategy='naive'), dict(remask='flag')):
        with pytest.raises(UserError, match='repair|random'):
            bound.generate_diffusion(open_canvas(1, 8), **options)
    with pytest.raises(UserError, match='sample.py'):
        check_defined(RefineConfig(), GPT(GPTConfig(**sizes)))
