"""nanodrift/costs.py: what is left to train, and its hours in words. Trials that are trained: test_compare.py."""
import json
import re

from nanodrift import costs
from nanodrift.costs import Remaining, plan_lines
from nanodrift.runs import Run
from nanodrift.tuning import SEED


def test_what_remains_is_what_the_logs_lack(tmp_path):
    run, attempt = (Run([], {'out_dir': str(tmp_path / name), 'max_iters': max_iters, 'seed': seed, 'block_size': 16,
                             'batch_size': 4, 'gradient_accumulation_steps': 2, 'data_dir': 'data'})
                    for name, max_iters, seed in (('run', 100, 1), ('try', 25, SEED)))
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'config.json').write_text(json.dumps(run.settings))
    for lines, left in (('', 100), ('{"iter": 40, "loss": 1}\n', 60), ('{"iter": 100, "val_loss": 1}\n', 0),
                        ('{"iter": 40, "diverged": true}\n', 0)):
        (tmp_path / 'run' / 'metrics.jsonl').write_text(lines)
        here = Remaining()
        here.add(run, 0.5)
        here.add(attempt, 0.5)
        assert (here.runs, here.tries, here.iterations) == (int(left > 0), 1, left + 25)
        assert here.tokens == 128 * (left + 25)
        assert here.parts == [(costs.RUNS, 1.5 * 128 * left), (costs.TRIES, 1.5 * 128 * 25)]


def test_the_plan_in_words():
    a = Remaining(runs=3, tries=2, iterations=1000, tokens=5000, parts=[(costs.RUNS, 7200.0)], speed=1.0, processors=4)
    b = Remaining(runs=1, iterations=8, tokens=1000)
    said = '\n'.join(plan_lines({'heat': b, 'gpt2': a}, 'core'))
    assert re.search(r'gpt2 +runs +3, tries +2, tokens +5,000 +8 core-hours\n', said)
    assert re.search(r'heat +runs +1, tries +0, tokens +1,000 +not timed\n', said)
    assert re.search(r'together +runs +4, tries +2, tokens +6,000 +8 core-hours\n', said)
    assert 'about 2 hours by the clock on 4 cores' in said and 'fewer than 60 iterations' in said and 'not included' in said
    assert 'clock' not in '\n'.join(plan_lines({'heat': b}, 'core'))
    assert plan_lines({}, 'core') == ['nothing is left to train']


def test_runs_at_the_same_time_wait_for_those_before_them():
    """A judge, then three tries, then three runs and a long one of another variant."""
    a = Remaining(parts=[(costs.TRIES, 10)] * 3 + [(costs.RUNS, 40)] * 3, speed=2.0)
    b = Remaining(parts=[(costs.RUNS, 90)], speed=1.0)
    judge = Remaining(parts=[(costs.HELPERS, 30)], speed=1.0)
    assert costs.seconds_by_the_clock((a, b, judge), 1) == 15 + 60 + 90 + 30
    assert costs.seconds_by_the_clock((a, b, judge), 2) == 7.5 + 90 + 30
    assert costs.seconds_by_the_clock((a, judge), 2) == 7.5 + 30 + 30
    assert costs.seconds_by_the_clock((a, b, judge), 4) == 5 + 90 + 30
