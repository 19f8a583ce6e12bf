"""
The named variants of the model types: what differs from `gpt2`, as settings of train.py. bench.py measures what they cost,
compare.py what they are good for.
"""
VARIANTS = {
    'gpt2': {},
    'gpt2 drafts': {'draft_block': 1},
    'dd': {'model_type': 'dd'},
    'dd drift': {'model_type': 'dd', 'apply_diffusion': False},
    'dd diffusion': {'model_type': 'dd', 'apply_drift': False},
    'heat': {'model_type': 'heat'},
    'heat distance': {'model_type': 'heat', 'heat_form': 'distance'},
    'heat adaptive': {'model_type': 'heat', 'heat_t': 'adaptive'},
    'rotating lr': {'model_type': 'rotating'},
    'rotating gp': {'model_type': 'rotating', 'rotating_head': 'gp'},
    'rotating lr norm': {'model_type': 'rotating', 'use_norm': True},
    'rotating gp norm': {'model_type': 'rotating', 'rotating_head': 'gp', 'use_norm': True},
    'parallel mean': {'model_type': 'parallel'},
    'parallel add': {'model_type': 'parallel', 'parallel_merge': 'add'},
    'parallel concat': {'model_type': 'parallel', 'parallel_merge': 'concat'},
    'duo': {'model_type': 'duo'},
    'diffusion': {'model_type': 'diffusion'},
    'diffusion nelbo': {'model_type': 'diffusion', 'diffusion_objective': 'nelbo'},
    'diffusion nelbo clipped': {'model_type': 'diffusion', 'diffusion_objective': 'nelbo', 'diffusion_t_min': 0.3,
                                'diffusion_t_max': 0.8},
    'diffusion blocks': {'model_type': 'diffusion', 'diffusion_objective': 'nelbo', 'diffusion_block': 4},
    'diffusion blocks shifted': {'model_type': 'diffusion', 'diffusion_objective': 'nelbo', 'diffusion_block': 4,
                                 'diffusion_shift': True},
    'diffusion blocks complement': {'model_type': 'diffusion', 'diffusion_objective': 'nelbo', 'diffusion_block': 4,
                                    'diffusion_shift': True, 'diffusion_complement': True},
    'drifting': {'model_type': 'drifting'},
    'drifting straight': {'model_type': 'drifting', 'drift_output': 'straight'},
}


def variants_of(model_types):
    """{name: settings}: VARIANTS, and each model type that has none of its own there."""
    known = {changes.get('model_type', 'gpt2') for changes in VARIANTS.values()}
    return VARIANTS | {kind: {'model_type': kind} for kind in model_types if kind not in known}


def first_of_each_type(variants):
    """The names of the first variant of each model type."""
    first = {}
    for name, changes in variants.items():
        first.setdefault(changes.get('model_type', 'gpt2'), name)
    return list(first.values())
