"""nanodrift/runs.py: what a folder holds of a run that is planned."""
import json
import math

import pytest

import compare
import train
from nanodrift.options import UserError
from nanodrift.runs import read_lines


def test_finished_is_what_the_checkpoint_says(command_line):
    """A kill between the line of the last evaluation and the save of the best checkpoint leaves an older best one."""
    run, longer = (compare.run_of(command_line(max_iters=n)) for n in (6, 7))
    assert run.state() is None and not run.finished(None) and run.last_loss() is None
    assert train.main(run.words) == 0
    state, loss = run.state(), read_lines(run.folder)[-1]['val_loss']
    assert run.finished(state) and run.last_loss() == loss and run.iterations_left() == 0 and not longer.finished(state)
    assert not run.finished(state | {'evaluated_iter': 5, 'best_val_loss': loss + 1})
    assert run.finished(state | {'evaluated_iter': 5, 'best_val_loss': loss - 1})  # killed before it was saved again
    with pytest.raises(UserError, match='max_iters=6, not 7.*--out_dir'):
        longer.state()


@pytest.mark.parametrize('change', [{}, {'device': 'cuda'}, {'n_embd': 32}, {'batch_size': 8}, {'dtype': 'bfloat16'},
                                    {'model_type': 'heat'}])
@pytest.mark.parametrize('last', [{'iter': 4, 'loss': 1}, {'iter': 4, 'diverged': True}])
def test_a_log_counts_for_a_run_with_its_settings_only(command_line, tmp_path, change, last):
    run = compare.run_of(command_line())
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'metrics.jsonl').write_text(json.dumps(last) + '\n')
    assert run.iterations_left() == 6  # nothing says whose log it is
    (tmp_path / 'run' / 'config.json').write_text(json.dumps(run.settings | change))
    same, diverged = set(change) <= {'device'}, 'diverged' in last  # a run may go on with another device
    assert run.iterations_left() == (6 if not same else 0 if diverged else 2)
    assert run.last_loss() == (math.inf if same and diverged else None)
