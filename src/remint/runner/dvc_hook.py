"""Loaded when Python starts: applies the guards of dvc_guard.py if DVC is imported later.

docker/install puts a line into the environment that imports this module. It imports nothing but sys, because every
start of Python pays for it.
"""

import sys

# Each guarded module of DVC, with the function of dvc_guard.py that wraps its functions.
_GUARDS = {
    "dvc.stage": "guard_stage",
    "dvc.stage.cache": "guard_push",
    "dvc.repo.experiments.apply": "guard_apply",
    "dvc_data.index.checkout": "guard_checkout",
    "dvc_data.hashfile.state": "guard_links",
}


class _Finder:
    """An importer that finds nothing itself. It applies the guards of a module right after it was imported."""

    @staticmethod
    def find_spec(name, path=None, target=None):  # type: ignore[no-untyped-def]  # typing is not imported
        if name not in _GUARDS:
            return None
        from importlib.util import find_spec

        guard = _GUARDS.pop(name)  # so that the next line does not come back here
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module):  # type: ignore[no-untyped-def]
            from remint.runner import dvc_guard

            load(module)
            getattr(dvc_guard, guard)(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Finder)
