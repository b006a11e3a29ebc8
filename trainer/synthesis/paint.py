"""What surfaces look like: colours as functions of a point on a surface, the same from everywhere and at every time.

That is what makes cross-view completion learnable and optical flow exact. Fine patterns fade to their mean where a pixel covers
more than their period (`footprint_m`), as a lens would blur them; without it distant texture flickers between frames.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from trainer.synthesis.boxes import Boxes, Look
from trainer.synthesis.city import CROSSING_FROM_M, CROSSING_TO_M, HALF_STREET_M, LANE_M, PAVEMENT_M, from_street_m
from trainer.synthesis.pose import multiply

Values = Float[np.ndarray, " n"]
Colours = Float[np.ndarray, "n 3"]


@dataclass(frozen=True)
class Light:
    """Sun and sky of a scene."""

    sun: Float[np.ndarray, "3"]
    """Unit vector towards it."""
    sun_colour: Float[np.ndarray, "3"]
    sky_colour: Float[np.ndarray, "3"]
    zenith: Float[np.ndarray, "3"]

    def on(self, normals: Float[np.ndarray, "n 3"]) -> Colours:
        """What a surface of each normal receives."""
        facing = np.clip(multiply(normals, self.sun[:, None])[:, 0], 0, None)[:, None]
        return facing * self.sun_colour + self.sky_colour * (0.75 + 0.25 * normals[:, 2:])


def draw_light(rng: np.random.Generator) -> Light:
    """A time of day."""
    azimuth, elevation = rng.uniform(0, 2 * np.pi), np.deg2rad(rng.uniform(20, 65))
    sun = np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])
    warmth = rng.uniform(0, 1)
    return Light(
        sun=sun,
        sun_colour=np.array([0.85, 0.8 - 0.1 * warmth, 0.72 - 0.25 * warmth]) * rng.uniform(0.7, 1.0),
        sky_colour=np.array([0.42, 0.46, 0.52]) * rng.uniform(0.8, 1.1),
        zenith=np.array([0.32, 0.5, 0.82]) * rng.uniform(0.7, 1.1),
    )


def paint_sky(directions: Float[np.ndarray, "n 3"], light: Light) -> Colours:
    """A gradient from a pale horizon to the zenith, with soft clouds and a glow around the sun."""
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    up = np.clip(unit[:, 2], 0, 1)[:, None] ** 0.6
    # Clouds lie on a plane far above, so they close around the horizon.
    spread = 3.0 / np.clip(unit[:, 2], 0.05, None)
    clouds = smooth_noise(unit[:, 0] * spread, unit[:, 1] * spread, seed=11)[:, None] * np.clip(unit[:, 2:] * 4, 0, 1)
    glow = np.clip(multiply(unit, light.sun[:, None]), 0, 1) ** 24 * 0.35
    horizon = np.array([0.82, 0.84, 0.86])
    return horizon * (1 - up) + light.zenith * up + 0.18 * clouds + glow * light.sun_colour


def paint_ground(x_m: Values, y_m: Values, footprint_m: Values, light: Light, *, seed: int) -> Colours:
    """Asphalt with its lines, zebra crossings and pavements; grass and paving between the houses."""
    across, along = from_street_m(x_m), from_street_m(y_m)
    on_x, on_y = np.abs(across) < HALF_STREET_M, np.abs(along) < HALF_STREET_M
    edge = HALF_STREET_M + PAVEMENT_M
    is_pavement = (np.abs(across) < edge) | (np.abs(along) < edge)

    grain = faded_noise(x_m, y_m, 0.25, footprint_m, seed=seed) + faded_noise(x_m, y_m, 2.2, footprint_m, seed=seed + 1)
    patches = faded_noise(x_m, y_m, 9.0, footprint_m, seed=seed + 2)
    asphalt = (0.27 + 0.05 * grain + 0.05 * patches)[:, None] * np.array([1.0, 1.0, 1.02])
    slabs = _joints(x_m, 1.5, footprint_m) + _joints(y_m, 1.5, footprint_m)
    pavement = (0.52 + 0.05 * grain - 0.12 * np.clip(slabs, 0, 1))[:, None] * np.array([1.0, 0.97, 0.92])
    grass = (0.30 + 0.10 * grain + 0.07 * patches)[:, None] * np.array([0.75, 1.0, 0.5])

    colour = np.where(is_pavement[:, None], pavement, grass)
    colour = np.where((on_x | on_y)[:, None], asphalt, colour)
    for offset, run, is_street in ((across, along, on_x & ~on_y), (along, across, on_y & ~on_x)):
        lines = _street_lines(offset, run, footprint_m) * is_street
        colour = colour * (1 - lines[:, None]) + 0.82 * lines[:, None]
    return colour * light.on(np.broadcast_to([0.0, 0.0, 1.0], (len(x_m), 3)))


def paint_boxes(
    boxes: Boxes,
    box: Int[np.ndarray, " n"],
    local_m: Float[np.ndarray, "n 3"],
    footprint_m: Values,
    light: Light,
) -> Colours:
    """Colours of points on boxes, given in the frames of the boxes."""
    half = boxes.half_m[box]
    axis = np.argmax(np.abs(local_m) / half, axis=1)
    rows = np.arange(len(box))
    sign = np.sign(local_m[rows, axis])
    # On a side, u runs along the wall and v upwards; on a roof both are horizontal.
    u = np.where(axis == 0, local_m[:, 1], local_m[:, 0])
    v = np.where(axis == 2, local_m[:, 1], local_m[:, 2] + half[:, 2])
    surface = Surface(u, v, axis, sign, half, boxes.seed[box], boxes.colour[box], footprint_m)
    colour = np.empty((len(box), 3))
    looks = boxes.look[box]
    for look in np.unique(looks):
        chosen = looks == look
        colour[chosen] = _PAINTERS[Look(look)](surface.take(chosen))
    normals = np.zeros((len(box), 3))
    yaw = boxes.yaw_rad[box] + np.where(axis == 1, np.pi / 2, 0.0)
    is_side = axis != 2
    normals[:, 0], normals[:, 1] = sign * np.cos(yaw) * is_side, sign * np.sin(yaw) * is_side
    normals[:, 2] = sign * ~is_side
    return colour * light.on(normals)


@dataclass(frozen=True)
class Surface:
    """Points on faces of boxes."""

    u_m: Values
    v_m: Values
    axis: Int[np.ndarray, " n"]
    """Which coordinate of the box is constant on the face: 0 front and back, 1 left and right, 2 top and bottom."""
    sign: Values
    half_m: Float[np.ndarray, "n 3"]
    seed: Int[np.ndarray, " n"]
    colour: Colours
    footprint_m: Values

    def take(self, chosen: np.ndarray) -> "Surface":
        """Some of the points."""
        return Surface(**{name: values[chosen] for name, values in vars(self).items()})

    @property
    def height(self) -> Values:
        """Share of the height of the box, 0 at its foot; 1 everywhere on top."""
        return np.where(self.axis == 2, 1.0, self.v_m / (2 * self.half_m[:, 2]))

    def along(self) -> Values:
        """Share along the face, 0 to 1."""
        reach = np.where(self.axis == 0, self.half_m[:, 1], self.half_m[:, 0])
        return 0.5 + 0.5 * self.u_m / reach


def _paint_facade(s: Surface) -> Colours:
    """Rows of windows over a ground floor of shops; windows of a house share size and tint, some are lit."""
    varied = _unit_hash(s.seed, 1), _unit_hash(s.seed, 2), _unit_hash(s.seed, 3)
    width, storey = 1.8 + 2.2 * varied[0], 2.9 + 0.8 * varied[1]
    column, row = np.floor(s.u_m / width), np.floor(s.v_m / storey)
    across, up = s.u_m / width - column, s.v_m / storey - row
    glass = _band(across, 0.18, 0.82, s.footprint_m / width) * _band(up, 0.25, 0.82, s.footprint_m / storey)
    shop = row < 1
    glass = np.where(
        shop, _band(across, 0.06, 0.94, s.footprint_m / width) * _band(up, 0.12, 0.75, s.footprint_m / storey), glass
    )
    glass = glass * (s.axis != 2)
    tint = 0.10 + 0.22 * _unit_hash(s.seed + (column * 131 + row * 17).astype(np.int64), 4)
    window = tint[:, None] * np.array([0.9, 1.0, 1.15]) + 0.05
    dirt = (
        faded_noise(s.u_m, s.v_m, 1.2, s.footprint_m, seed=5) * 0.08
        + faded_noise(s.u_m, s.v_m, 0.2, s.footprint_m, seed=6) * 0.06
    )
    bricks = 0.06 * (_joints(s.v_m, 0.3, s.footprint_m) + _joints(s.u_m, 0.6, s.footprint_m)) * (varied[2] > 0.5)
    signs = s.colour[:, ::-1] * 0.9 + 0.1
    band = (shop & (up > 0.78) & (s.axis != 2))[:, None]
    wall = np.where(band, signs, s.colour) * (1 + dirt - bricks)[:, None]
    return wall * (1 - glass[:, None]) + window * glass[:, None]


def _paint_body(s: Surface) -> Colours:
    """The lower half of a vehicle: wheels and sills on the sides, lamps and a plate at the ends."""
    along, height = s.along(), s.height
    colour = s.colour * (1 + 0.05 * faded_noise(s.u_m, s.v_m, 0.5, s.footprint_m, seed=7))[:, None]
    is_side, is_end = s.axis == 1, s.axis == 0
    reach = s.half_m[:, 0]
    wheel = np.minimum(np.hypot(s.u_m - 0.62 * reach, s.v_m - 0.25), np.hypot(s.u_m + 0.62 * reach, s.v_m - 0.25)) < 0.36
    colour = np.where((is_side & wheel)[:, None], 0.04, colour)
    stripe = is_side & (np.abs(height - 0.62) < 0.06)
    colour = np.where(stripe[:, None], colour * 0.6, colour)
    lamp = is_end & (np.abs(height - 0.68) < 0.16) & (np.abs(along - 0.5) > 0.3)
    lamps = np.where((s.sign > 0)[:, None], np.array([0.95, 0.95, 0.85]), np.array([0.75, 0.05, 0.05]))
    colour = np.where(lamp[:, None], lamps, colour)
    plate = is_end & (np.abs(along - 0.5) < 0.14) & (np.abs(height - 0.4) < 0.1)
    return np.where(plate[:, None], 0.85, colour)


def _paint_cabin(s: Surface) -> Colours:
    """Windows all round below a painted roof; the pillars keep the colour of the vehicle."""
    along, height = s.along(), s.height
    low = np.where(s.half_m[:, 2] > 0.8, 0.45, 0.12)
    pillars = np.abs((along * 4) % 1 - 0.5) > 0.42
    is_window = (s.axis != 2) & (height > low) & (height < 0.88) & ~pillars
    glass = np.array([0.09, 0.11, 0.14]) + 0.05 * height[:, None]
    below = (s.axis != 2) & (height < 0.12) & (s.half_m[:, 2] > 0.8)
    return np.where(is_window[:, None], glass, np.where(below[:, None], 0.06, s.colour))


def _paint_person(s: Surface) -> Colours:
    """Shoes, trousers, a coat and a head."""
    trousers = 0.12 + 0.25 * _unit_hash(s.seed, 9)[:, None] * np.array([0.8, 0.9, 1.2])
    colour = np.where((s.height < 0.48)[:, None], trousers, s.colour)
    colour = np.where((s.height < 0.06)[:, None], 0.05, colour)
    is_head = s.height > 0.85
    skin = np.array([0.75, 0.55, 0.42]) * (0.5 + 0.6 * _unit_hash(s.seed, 10))[:, None]
    return np.where(is_head[:, None], skin, colour)


def _paint_pole(s: Surface) -> Colours:
    return s.colour * (1 + 0.2 * faded_noise(s.u_m, s.v_m, 0.15, s.footprint_m, seed=12))[:, None]


def _paint_leaves(s: Surface) -> Colours:
    """Clumps of light and dark."""
    clumps = faded_noise(s.u_m, s.v_m, 0.7, s.footprint_m, seed=13) + 0.7 * faded_noise(
        s.u_m, s.v_m, 0.22, s.footprint_m, seed=14
    )
    return np.clip(s.colour * (1 + 0.55 * clumps)[:, None], 0, 1)


def _paint_cone(s: Surface) -> Colours:
    is_band = (np.abs(s.height - 0.45) < 0.1) | (np.abs(s.height - 0.75) < 0.06)
    return np.where(is_band[:, None], 0.9, s.colour)


_PAINTERS = {
    Look.FACADE: _paint_facade,
    Look.BODY: _paint_body,
    Look.CABIN: _paint_cabin,
    Look.PERSON: _paint_person,
    Look.POLE: _paint_pole,
    Look.LEAVES: _paint_leaves,
    Look.CONE: _paint_cone,
}


def _street_lines(offset_m: Values, run_m: Values, footprint_m: Values) -> Values:
    """White paint of a street, seen along it: dashed centre, parking lines, zebra crossings and stop lines at its ends."""
    distance = np.abs(run_m)
    dashes = _band((run_m / 6.0) % 1.0, 0.0, 0.5, footprint_m / 6.0)
    centre = _band(offset_m, -0.09, 0.09, footprint_m) * dashes
    parking = _band(np.abs(offset_m), LANE_M - 0.06, LANE_M + 0.06, footprint_m)
    open_road = distance > CROSSING_TO_M + 1.2
    crossing = (distance > CROSSING_FROM_M) & (distance < CROSSING_TO_M)
    zebra = _band((offset_m / 1.0) % 1.0, 0.0, 0.5, footprint_m) * crossing
    stop = _band(distance, CROSSING_TO_M + 0.6, CROSSING_TO_M + 1.0, footprint_m) * (offset_m * np.sign(run_m) < LANE_M)
    return np.clip(0.9 * (centre + parking) * open_road + 0.95 * zebra + 0.8 * stop, 0, 1)


def _band(x: Values, low: float, high: float, footprint: Values) -> Values:
    """1 between `low` and `high`, with edges as soft as a pixel is large; a wide pixel sees its share of the band."""
    soft = np.maximum(footprint, 1e-4)
    inside = np.clip((x - low) / soft + 0.5, 0, 1) * np.clip((high - x) / soft + 0.5, 0, 1)
    return inside * np.clip((high - low) / soft, 0, 1)


def _joints(x_m: Values, period_m: float, footprint_m: Values) -> Values:
    """Thin dark lines every `period_m`."""
    return _band((x_m / period_m) % 1.0, 0.0, 0.05, footprint_m / period_m)


def faded_noise(x_m: Values, y_m: Values, period_m: float, footprint_m: Values, *, seed: int) -> Values:
    """Smooth noise in [-1, 1] of one scale; it fades out where a pixel covers half its period."""
    fade = np.clip(1.5 - 2.5 * footprint_m / period_m, 0, 1)
    return fade * smooth_noise(x_m / period_m, y_m / period_m, seed=seed)


def smooth_noise(x: Values, y: Values, *, seed: int) -> Values:
    """Value noise: random numbers at integer points, smoothly interpolated, in [-1, 1]."""
    column, row = np.floor(x), np.floor(y)
    across, up = x - column, y - row
    across, up = across * across * (3 - 2 * across), up * up * (3 - 2 * up)
    i, j = column.astype(np.int64), row.astype(np.int64)
    left = _lattice(i, j, seed) * (1 - up) + _lattice(i, j + 1, seed) * up
    right = _lattice(i + 1, j, seed) * (1 - up) + _lattice(i + 1, j + 1, seed) * up
    return left * (1 - across) + right * across


def _lattice(i: Int[np.ndarray, " n"], j: Int[np.ndarray, " n"], seed: int) -> Values:
    return _unit_hash(i * 0x9E3779B1 + j * 0x85EBCA77, seed) * 2 - 1


def _unit_hash(number: Int[np.ndarray, " n"], salt: int) -> Values:
    """A number in [0, 1) that looks random, from each integer."""
    mixed = (number.astype(np.uint64) + np.uint64(salt * 0xC2B2AE3D)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return (mixed >> np.uint64(40)).astype(np.float64) / float(1 << 24)
