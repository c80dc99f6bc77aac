"""Models in folders laid out like those of the Hugging Face Hub, and on the Hub itself, if huggingface_hub is installed."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

_FACTS = {
    "library_name": "biasloss_ext",
    "tags": ["image-classification", "skipblocknet"],
    "paper_url": "https://arxiv.org/abs/2107.11170",
}

if TYPE_CHECKING:
    from typing_extensions import Self

    class _Mixin:
        def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None: ...

        def push_to_hub(self, repo_id: str, **options: Any) -> str: ...

        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self: ...

else:
    try:
        import safetensors.torch  # noqa: F401  (the mixin needs it, and does not say so)
        from huggingface_hub import PyTorchModelHubMixin

        class _Mixin(PyTorchModelHubMixin, **_FACTS):
            pass

    except ImportError as error:
        _missing = error.name or "huggingface_hub"

        def _needed(method):
            def refuse(*_, **__):
                raise ImportError(f"{method} needs {_missing}: pip install 'biasloss_ext[hub]'", name=_missing)

            return refuse

        class _Mixin:
            save_pretrained, push_to_hub = _needed("save_pretrained"), _needed("push_to_hub")
            from_pretrained = _needed("from_pretrained")


class HubModel(_Mixin):
    """A model with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``, those of ``PyTorchModelHubMixin``."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The arguments that build a model with these parameters, as kept in config.json."""

    def save_pretrained(self, save_directory: str | Path, *, config: Any = None, **options: Any) -> str | None:
        """Write model.safetensors, config.json and README.md into a folder, from which ``from_pretrained`` loads.

        Args:
            save_directory: the folder; it is made if it is missing.
            config: what to write into config.json instead of :meth:`config`.
            options: those of ``huggingface_hub.PyTorchModelHubMixin.save_pretrained``.

        Raises:
            ImportError: huggingface_hub or safetensors is not installed.
        """
        # Not what the mixin has recorded, the arguments of the constructor: the classifier may have been replaced since.
        return super().save_pretrained(save_directory, config=config or self.config(), **options)
