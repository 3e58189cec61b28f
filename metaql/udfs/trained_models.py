"""Models that ``save_as`` kept, as functions in SQL name them."""

from __future__ import annotations

import difflib
from pathlib import Path

from metaql.errors import QueryError, UnknownNameError
from metaql.methods.elite import Fitted
from metaql.storage import saved_models
from metaql.storage.saved_models import SavedModel
from metaql.udfs.elite_fit import KIND
from metaql.udfs.session import Session


def find_model(stores: tuple[Path, ...], name: str) -> SavedModel:
    """The current version of a model of ELITE's; UnknownNameError, with those there are, where there is none."""
    folder = saved_models.place_of(stores, name)
    if saved_models.stamp(folder) is None:
        there = sorted({each for store in stores for each in saved_models.names(store)})
        close = difflib.get_close_matches(name, there, 1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise UnknownNameError(
            f"there is no model '{name}'.{hint} There are: {', '.join(there) or 'none'}. FROM elite(…, save_as :="
            " 'name') makes one; those elsewhere are named by their folder"
        )
    found = saved_models.read(folder)
    if found.kind != KIND:
        raise QueryError(f"'{name}' is a model of another kind ({found.kind}): name one that elite(…) has saved")
    return found


def loaded(session: Session, name: str) -> tuple[Fitted, SavedModel]:
    """The model in memory; read once, and again when another was saved under its name."""
    stores = tuple(dict.fromkeys(store.path for store in session.stores))
    folder = saved_models.place_of(stores, name)
    found: tuple[Fitted, SavedModel] = session.fits.read(
        folder, saved_models.stamp(folder), lambda: _read(find_model(stores, name))
    )
    return found


def _read(model: SavedModel) -> tuple[Fitted, SavedModel]:
    return Fitted.restored(model.tensors(), dict(model.description)), model
