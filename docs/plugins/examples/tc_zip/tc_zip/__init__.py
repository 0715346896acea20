"""What the plugin offers. Imported on every start of torchchat: nothing heavy here."""

from torchchat_core.hookspecs import hookimpl
from torchchat_core.specs import ModelSourceInfo


@hookimpl
def torchchat_model_sources() -> list[ModelSourceInfo]:
    return [ModelSourceInfo(
        name="zip", summary="models in .zip archives: zip:model.zip", factory="tc_zip.source:ZipSource",
        schemes=frozenset({"zip"}), keeps=True,
    )]
