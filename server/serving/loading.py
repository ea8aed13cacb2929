"""Loads a model from settings and serves it: the part that runs before torch and transformers are imported.

Importing them takes seconds, so `load` imports `server.serving.assembly` alone, on the thread that loads; everything
that needs them is there.
"""

from __future__ import annotations

from pathlib import Path

from expert_store.integrity import TrunkCheck
from expert_store.manifest import Manifest, read_manifest
from server.errors import SettingsError
from server.model.load_progress import DEVICE_PHASES, LoadProgress, Phase, load_weights
from server.serving.service import LoadedModel
from server.settings.schema import Settings


def check_store(settings: Settings) -> Manifest:
    """The manifest of the store that the settings name. It is cheap: a wrong path fails before anything starts.

    Raises:
        SettingsError: no store is named. ManifestError: it is no store, or of an unknown version.
    """
    return read_manifest(_store_path(settings))


def load(settings: Settings, progress: LoadProgress, *, grows_by_itself: bool = True) -> LoadedModel:
    """Open the store, load the model on the engine's thread, and return when requests are taken. Blocks for long.

    Args:
        grows_by_itself: take up the growth without commands that the settings ask for.

    Raises:
        StoreError, MaskError, SettingsError, TrunkError: the store, the mask or the memory does not allow it.
    """
    manifest = check_store(settings)
    progress.expect(load_weights(manifest, settings.model.slots))
    if settings.model.decode_path == "host" or settings.model.device == "cpu":
        progress.leave_out(DEVICE_PHASES)
    progress(Phase.STARTING, 0.0)
    trunk_check = TrunkCheck(_store_path(settings).resolve(), manifest)  # its threads hash during the imports
    from server.serving.assembly import assemble

    return assemble(settings, trunk_check, progress, grows_by_itself=grows_by_itself)


def _store_path(settings: Settings) -> Path:
    if settings.store is None:
        raise SettingsError("no store is named: give its directory as the first argument, or set DEEPFEW_STORE")
    return settings.store
