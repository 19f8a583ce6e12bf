"""demo.py: the commands it runs are those of a user, and they end in text."""
from conftest import run_script


def test_the_demo_of_masked_refinement(tmp_path):
    args = ['--model_type=diffusion', '--max_iters=2', f'--out_dir={tmp_path}/out', f'--data_dir={tmp_path}/data']
    said = run_script('demo.py', *args, timeout=300).stdout
    commands = [line.split()[2] for line in said.splitlines() if line.startswith('$ python')]
    assert commands == ['prepare.py', 'train.py', 'train.py', 'generate_diffusion.py']
    assert 'the model needs at most' in said and 'step   0,   0 passes' in said and '\ndef ' in said
