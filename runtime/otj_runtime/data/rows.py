"""Rows: a sequence of which subclasses say how one row is read, and get slices for it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar, overload

Row_co = TypeVar("Row_co", covariant=True)


class RowSequence(Sequence[Row_co], Generic[Row_co]):
    """A sequence whose rows are made when they are read; so slices are lists of rows."""

    @abstractmethod
    def row(self, index: int) -> Row_co:
        """The row at `index`, from 0 on."""

    @overload
    def __getitem__(self, index: int) -> Row_co: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row_co]: ...

    def __getitem__(self, index: int | slice) -> Row_co | list[Row_co]:
        places = range(len(self))[index]
        return self.row(places) if isinstance(places, int) else [self.row(place) for place in places]
