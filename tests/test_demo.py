"""demo.py: the commands it runs are those of a user, and they end in text."""
import pytest
from conftest import run_script


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp('demo-data')


def demo(model_type, folder, data_dir):
    """-> what `demo.py` printed, and the scripts it ran, in order."""
    args = [f'--model_type={model_type}', '--max_iters=2', f'--out_dir={folder}/out', f'--data_dir={data_dir}']
    said = run_script('demo.py', *args, timeout=300).stdout
    return said, [line.split()[2] for line in said.splitlines() if line.startswith('$ python')]


def test_the_demo_of_masked_refinement(tmp_path, data_dir):
    said, commands = demo('diffusion', tmp_path, data_dir)
    assert [c for c in commands if c != 'prepare.py'] == ['train.py', 'train.py', 'generate_diffusion.py']
    assert 'the model needs at most' in said and 'step   0,   0 passes' in said and '\ndef ' in said


def test_the_demo_of_one_step_generation(tmp_path, data_dir):
    said, commands = demo('drifting', tmp_path, data_dir)
    assert [c for c in commands if c != 'prepare.py'] == ['train.py', 'train.py', 'sample.py']
    assert said.count('\n---------------\n') == 16
    assert (tmp_path / 'out-encoder').is_dir()
