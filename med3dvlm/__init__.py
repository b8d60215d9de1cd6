"""Med3DVLM: vision-language models for 3D medical volumes.

    from med3dvlm import load_model
    print(load_model("folder").answer("scan.nii.gz", "Which organ is abnormal?").text)

The names are imported when they are first used, so that `import med3dvlm` itself costs nothing: commands that prepare
data need neither torch nor transformers. Transformers' Auto classes know both models from then on.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder

_HOME = {
    "CLIPConfig": "med3dvlm.configuration",
    "CLIPModel": "med3dvlm.model.clip",
    "VLMConfig": "med3dvlm.configuration",
    "VLMForCausalLM": "med3dvlm.model.vlm",
    "load_clip": "med3dvlm.inference",
    "load_model": "med3dvlm.inference",
}
_AUTO_CONFIG = "transformers.models.auto.configuration_auto"
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


class _StandIn(type):
    """What `AutoConfig` knows in a configuration's place: asked for one, it imports the models, which register."""

    def _configuration(cls) -> type:
        import_module("med3dvlm.model")
        return __getattr__(cls.__name__)

    def __call__(cls, *arguments, **options):
        return cls._configuration()(*arguments, **options)

    def __getattr__(cls, name: str):
        return getattr(cls._configuration(), name)


def _register(auto) -> None:
    for model_type, name in (("dec_clip", "CLIPConfig"), ("vlm_qwen", "VLMConfig")):
        auto.AutoConfig.register(model_type, _StandIn(name, (), {}))


class _AfterAutoConfig(MetaPathFinder):
    """Registers as soon as transformers' module of `AutoConfig` has been imported.

    Importing the models at that point would meet modules of transformers, and of ours, that are only half imported.
    """

    def find_spec(self, name: str, path, target=None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == _AUTO_CONFIG else None
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = exec_module
        return spec


if _AUTO_CONFIG in sys.modules:
    _register(sys.modules[_AUTO_CONFIG])
else:
    sys.meta_path.insert(0, _AfterAutoConfig())
