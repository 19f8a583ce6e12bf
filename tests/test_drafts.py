"""experiments/drafts.py: the ceiling against a slow sum, and the command."""
import json

import pytest
import torch
from test_model import make, tokens

import export
import train
from experiments import drafts
from nanodrift.options import UserError


def test_the_ceiling_is_what_the_best_guess_without_r_gives():
    model, prompts = make(spread=0.4, vocab_size=5), tokens(3, 6, vocab_size=5)
    wanted = 0.0
    with torch.no_grad():
        for prompt in prompts.tolist():
            def p(text):
                return model(torch.tensor([text]))[0][0, -1].softmax(-1)
            first, after = p(prompt), [p([*prompt, r]) for r in range(5)]
            q = sum(first[r] * after[r] for r in range(5))
            wanted += sum(float(first[r] * min(after[r][x], q[x])) for r in range(5) for x in range(5))
    assert drafts.ceiling(model, prompts, branches=5) == pytest.approx(1 + wanted / 3, rel=1e-5)
    assert drafts.ceiling(model, prompts, branches=5, temperature=0) == pytest.approx(2)  # r is certain


def test_the_command(settings, data_dir, tmp_path, capsys):
    values = settings(model_type='drafts', block_size=24)
    assert train.main([f'--{key}={value}' for key, value in values.items()]) == 0
    args = [f'--out_dir={values["out_dir"]}', '--prompts=4', '--prompt_tokens=4', '--new_tokens=8', '--rounds=1',
            '--device=cpu', '--dtype=float32', '--at_once=2']
    capsys.readouterr()
    drafts.main(args)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found) == {'plain', 'ngram', 'own', 'ceiling'} and 1 <= found['ceiling'] <= 2
    assert found['plain']['tokens_per_pass'] == 1 <= found['own']['tokens_per_pass'] <= 2
    with pytest.raises(UserError, match='block_size=24'):
        drafts.main([*args, '--new_tokens=40'])
    export.main([f'--out_dir={values["out_dir"]}', f'--to={tmp_path}/exported'])
    with pytest.raises(UserError, match='--data=FOLDER'):
        drafts.main([*args, f'--out_dir=hf:{tmp_path}/exported'])
    drafts.main([*args, f'--out_dir=hf:{tmp_path}/exported', f'--data={data_dir}/tiny_byte'])
