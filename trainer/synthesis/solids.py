"""Convex solids: the one kind of geometry that the world is built of.

A solid is an intersection of half spaces, `normals @ x <= offsets`; its bounding faces carry a texture each. Texture
coordinates are affine in the point, `u = u_axes[:3] @ x + u_axes[3]`, one unit per tile, so that a solid moves by moving
its planes and axes. Many solids lie in one structure of arrays; letters here: K solids, F faces of all of them.

Left to whom: `rays` finds what a ray hits first, `texture` has the tiles, `bodies` and `city` say what is built.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

Colour = tuple[float, float, float]
WHITE: Colour = (1.0, 1.0, 1.0)


class Tiles(NamedTuple):
    """Consecutive tiles of the atlas: which one shows in a cell is drawn by lot."""

    first: int
    count: int


class Skin(NamedTuple):
    """What a face looks like."""

    tiles: Tiles
    tint: Colour = WHITE
    """Colour of the tile's paintable part."""
    cell_m: tuple[float, float] | None = None
    """Size of one tile on the face; none stretches one tile over it."""
    street_tiles: Tiles | None = None
    """Tiles of the lowest row of cells; none takes `tiles` there too."""


@dataclass(frozen=True)
class Solids:
    """K convex solids with F faces; solid k has the faces first_face[k] to first_face[k + 1]."""

    normals: Float[np.ndarray, "F 3"]
    offsets: Float[np.ndarray, " F"]
    u_axes: Float[np.ndarray, "F 4"]
    v_axes: Float[np.ndarray, "F 4"]
    tiles: Int[np.ndarray, "F 4"]
    """First tile and number of tiles, above and in the lowest row of cells."""
    tints: Float[np.ndarray, "F 3"]
    lots: Int[np.ndarray, " F"]
    """Seeds of the lot that picks a cell's tile."""
    corners: Float[np.ndarray, "K 8 3"]
    """A box around each solid."""
    faces: Int[np.ndarray, " K"]
    """Number of faces of each solid."""

    @property
    def count(self) -> int:
        """K."""
        return len(self.faces)

    @property
    def first_face(self) -> Int[np.ndarray, " K+1"]:
        """Where each solid's faces begin."""
        return np.concatenate([[0], np.cumsum(self.faces)])

    @property
    def solid_of_face(self) -> Int[np.ndarray, " F"]:
        """The solid that each face belongs to."""
        return np.repeat(np.arange(self.count), self.faces)


def stack(parts: Sequence[Solids]) -> Solids:
    """All solids of `parts`, in order."""
    return Solids(**{field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Solids)})


def move(solids: Solids, a_from_b: Float[np.ndarray, "K 4 4"]) -> Solids:
    """The solids in frame a, each by its own transform."""
    of_face = a_from_b[solids.solid_of_face]
    rotation, translation = of_face[:, :3, :3], of_face[:, :3, 3]
    normals = np.einsum("fij,fj->fi", rotation, solids.normals)
    corners = np.einsum("kij,knj->kni", a_from_b[:, :3, :3], solids.corners) + a_from_b[:, None, :3, 3]
    return Solids(
        normals=normals,
        offsets=solids.offsets + np.einsum("fi,fi->f", normals, translation),
        u_axes=_move_axes(solids.u_axes, rotation, translation),
        v_axes=_move_axes(solids.v_axes, rotation, translation),
        tiles=solids.tiles,
        tints=solids.tints,
        lots=solids.lots,
        corners=corners,
        faces=solids.faces,
    )


def polyhedron(faces: Sequence[Float[np.ndarray, "_ 3"]], skins: Sequence[Skin], lot: int = 0) -> Solids:
    """One convex solid from the corners of its flat faces."""
    points = np.concatenate(faces)
    centre = points.mean(0)
    planes = [_plane(face, centre) for face in faces]
    axes = [_texture_axes(face, plane[0], skin.cell_m) for face, plane, skin in zip(faces, planes, skins, strict=True)]
    return Solids(
        normals=np.array([normal for normal, _ in planes]),
        offsets=np.array([offset for _, offset in planes]),
        u_axes=np.array([u for u, _ in axes]),
        v_axes=np.array([v for _, v in axes]),
        tiles=np.array([(*skin.tiles, *(skin.street_tiles or skin.tiles)) for skin in skins], dtype=np.int32),
        tints=np.array([skin.tint for skin in skins], dtype=float),
        lots=(lot * 16 + np.arange(len(faces))).astype(np.int64) % 2**31,
        corners=_corners(points.min(0), points.max(0))[None],
        faces=np.array([len(faces)]),
    )


class Skins(NamedTuple):
    """The skins of something with a front (+x)."""

    sides: Skin
    front: Skin
    back: Skin
    top: Skin

    @classmethod
    def all(cls, skin: Skin) -> "Skins":
        """The same everywhere."""
        return cls(skin, skin, skin, skin)


def frustum(
    low: Sequence[float], high: Sequence[float], skins: Skins, *, inset: Sequence[float] = (0, 0, 0), lot: int = 0
) -> Solids:
    """A box from `low` to `high` whose top is drawn in: at the back, at the front, at both sides."""
    (x0, y0, z0), (x1, y1, z1) = low, high
    back, front, side = inset
    bottom = np.array([[x0, y0, z0], [x1, y0, z0], [x1, y1, z0], [x0, y1, z0]], dtype=float)
    top = np.array([[x0 + back, y0 + side, z1], [x1 - front, y0 + side, z1], [x1 - front, y1 - side, z1], [x0 + back, y1 - side, z1]])
    walls = [np.stack([bottom[i], bottom[(i + 1) % 4], top[(i + 1) % 4], top[i]]) for i in range(4)]
    skin = (skins.sides, skins.front, skins.sides, skins.back, skins.top, skins.top)
    return polyhedron([*walls, top, bottom], skin, lot)


def prism(outline: Float[np.ndarray, "_ 2"], z0: float, z1: float, sides: Skin, top: Skin, *, taper: float = 1.0, lot: int = 0) -> Solids:
    """A vertical column over a convex outline; `taper` shrinks its top about the outline's middle."""
    middle = outline.mean(0)
    bottom = np.column_stack([outline, np.full(len(outline), z0)])
    upper = np.column_stack([middle + (outline - middle) * taper, np.full(len(outline), z1)])
    turn = np.roll(np.arange(len(outline)), -1)
    walls = [np.stack([bottom[i], bottom[j], upper[j], upper[i]]) for i, j in enumerate(turn)]
    return polyhedron([*walls, upper, bottom], [sides] * len(walls) + [top, top], lot)


def disc_outline(x: float, y: float, radius: float, corners: int = 8) -> Float[np.ndarray, "_ 2"]:
    """A regular polygon."""
    angles = (np.arange(corners) + 0.5) * 2 * np.pi / corners
    return np.column_stack([x + radius * np.cos(angles), y + radius * np.sin(angles)])


def _plane(face: Float[np.ndarray, "_ 3"], inside: Float[np.ndarray, " 3"]) -> tuple[Float[np.ndarray, " 3"], float]:
    # Newell's sum over all edges: three neighbouring corners may lie on one line or coincide.
    normal = np.cross(face, np.roll(face, -1, 0)).sum(0) - np.cross(face.mean(0), (np.roll(face, -1, 0) - face).sum(0))
    normal = normal / np.linalg.norm(normal)
    if normal @ (face[0] - inside) < 0:
        normal = -normal
    return normal, float(normal @ face.mean(0))


def _texture_axes(
    face: Float[np.ndarray, "_ 3"], normal: Float[np.ndarray, " 3"], cell_m: tuple[float, float] | None
) -> tuple[Float[np.ndarray, " 4"], Float[np.ndarray, " 4"]]:
    """u to the right and v up, as seen from outside; x and y on faces that lie flat."""
    if abs(normal[2]) < 0.8:
        u = np.array([-normal[1], normal[0], 0.0]) / np.hypot(normal[0], normal[1])
        v = np.cross(normal, u)
    else:
        u, v = np.eye(3)[0], np.eye(3)[1]
    axes = []
    for axis, cell in zip((u, v), cell_m or (None, None), strict=True):
        along = face @ axis
        size = cell or max(float(np.ptp(along)), 1e-6)
        axes.append(np.append(axis, -along.min()) / size)
    return axes[0], axes[1]


def _corners(low: Float[np.ndarray, " 3"], high: Float[np.ndarray, " 3"]) -> Float[np.ndarray, "8 3"]:
    pick = np.array([[(i >> axis) & 1 for axis in range(3)] for i in range(8)])
    return np.where(pick, high, low).astype(float)


def _move_axes(
    axes: Float[np.ndarray, "F 4"], rotation: Float[np.ndarray, "F 3 3"], translation: Float[np.ndarray, "F 3"]
) -> Float[np.ndarray, "F 4"]:
    direction = np.einsum("fij,fj->fi", rotation, axes[:, :3])
    return np.column_stack([direction, axes[:, 3] - np.einsum("fi,fi->f", direction, translation)])
