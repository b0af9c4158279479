"""codebook taken apart: codebooks and column scales are continuous, a unit is a vector with all its stages."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from quantkit.formats.codebook import CodebookWeight
from quantkit.kernels.bitpack import unpack
from quantkit.kernels.codebook_rule import range_width
from quantkit.quantizers import kmeans
from quantkit.tuning.parts.base import Coded, Scaled, described


class TunableCodebook(Coded):
    """codebook: codebooks and column scales are continuous, a unit is a vector with all its stages."""

    codes: Tensor  # int64 [vectors, columns, stages]
    place: Tensor  # int64 [in_features], of each input feature in the stored order

    def __init__(self, weight: CodebookWeight) -> None:
        super().__init__()
        self._weight = described(weight)
        self._columns, self._v = weight.columns, weight.books.shape[2]
        stages = weight.stages()
        bits = [(books.shape[1] - 1).bit_length() for _, books in stages]
        self._ranges = [len(books) for _, books in stages]
        self.bits = sum(bits) / self._v
        found = [unpack(codes, width, weight.columns).long() for (codes, _), width in zip(stages, bits, strict=True)]
        self.register_buffer("codes", torch.stack(found, dim=-1))
        self.books = nn.ModuleList([Scaled(books) for _, books in stages])
        self.scales = None if weight.scales is None else Scaled(weight.scales, each=True)
        self.outliers = None if weight.outliers is None else TunableCodebook(weight.outliers)
        order = torch.arange(weight.in_features, device=weight.codes.device)
        if weight.order is not None:
            order = order.index_copy(0, weight.order.long(), order)
        self.register_buffer("place", order)

    def decode(self) -> Tensor:
        """The weight [out_features, in_features]: the sum of the stages' vectors, in its places and scaled."""
        weight = self._stored()[:, self.place]
        return weight if self.scales is None else weight * self.scales()

    def _stored(self) -> Tensor:
        vectors = sum(self._looked_up(stage, self.codes[..., stage]) for stage in range(len(self.books)))
        assert isinstance(vectors, Tensor)
        weight = vectors.transpose(1, 2).flatten(0, 1)[: self._weight.out_features]
        return weight if self.outliers is None else torch.cat([self.outliers._stored(), weight], dim=1)

    def _looked_up(self, stage: int, codes: Tensor) -> Tensor:
        """[vectors, columns, v]."""
        books = self.books[stage]()
        width = range_width(self._columns, self._ranges[stage])
        offset = torch.arange(self._columns, device=codes.device) // width * books.shape[1]
        return books.flatten(0, 1)[codes + offset]

    def units(self, weight: Tensor) -> Tensor:
        """Vectors [vectors * columns, v] in the stored order, without scales; outliers are units of their own."""
        if self.scales is not None:
            weight = weight / self.scales().detach()
        return self._own_units(weight[:, self.place.argsort()])

    def _own_units(self, stored: Tensor) -> Tensor:
        own = stored[:, stored.shape[1] - self._columns :]
        padded = torch.nn.functional.pad(own, (0, 0, 0, -own.shape[0] % self._v))
        return padded.unflatten(0, (-1, self._v)).transpose(1, 2).flatten(0, 1)

    @torch.no_grad()
    def nearest(self, index: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest centroid of targets [n, vector_length], a stage after the other."""
        codes = torch.empty(len(index), len(self.books), dtype=torch.int64, device=index.device)
        total = torch.zeros_like(target)
        column = index % self._columns
        for stage, scaled in enumerate(self.books):
            books = scaled()
            part = column // range_width(self._columns, self._ranges[stage])
            for i in range(self._ranges[stage]):
                mine = (part == i).nonzero().flatten()
                codes[mine, stage] = kmeans.assign(target[mine] - total[mine], books[i])[0]
                total[mine] += books[i][codes[mine, stage]]
        return codes, total

    def assign(self, index: Tensor, codes: Tensor) -> None:
        """See `Coded`."""
        self.codes.view(-1, self.codes.shape[-1])[index] = codes

    @torch.no_grad()
    def packed(self) -> CodebookWeight:
        """See `Tunable`."""
        books = [book().half() for book in self.books]
        main = CodebookWeight.pack([*self.codes.unbind(-1)], books, self._weight.out_features)
        order = None if self._weight.order is None else self.place.argsort().to(self._weight.order.dtype)
        return replace(
            main,
            in_features=self._weight.in_features,
            scales=None if self.scales is None else self.scales().half(),
            order=order,
            outliers=None if self.outliers is None else self.outliers.packed(),
        )
