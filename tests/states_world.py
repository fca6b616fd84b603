"""Whoever runs on a pool of a model that keeps states: generations and caches, one random thing at a time.

Every logit is compared with one pass of the model that has no cache. All is computed in float64, where rounding is
about 1e-13: a difference above `NOISE` means that a state, or K and V, of something else were read.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from random import Random
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

import kvblocks
from kvblocks import NoFreeBlocks, Pool
from kvblocks.errors import NoFreeStates
from kvblocks.generation.request import Request
from kvblocks.integrations.transformers import PagedCache
from kvblocks.integrations.transformers.layers import cache_argument, cache_groups, goes_on_by_one, keeps_offsets

# These tensors are tiny, and threads would only wait for each other.
torch.set_num_threads(1)

NOISE = 1e-9
BLOCK = 4
LONGEST = 56  # tokens of a chat
Extra = tuple[tuple[int, bytes], ...]
EXTRAS: list[Extra] = [(), ((2, b"x"),), ((9, b"x"),), ((9, b"y"),)]  # what prompts stand for beyond their ids
SALTS = [b"", b"a"]


@contextmanager
def in_double() -> Iterator[None]:
    """Whoever asks for float32 gets float64: models keep states, and compute what is delicate, in no less than that."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "float32", torch.float64)
            patch.setattr(torch, "float", torch.float64)
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            yield
    finally:
        torch.set_default_dtype(before)


class Broken(Exception):
    """A pass that fails in the middle."""


class Breaker:
    """Raises when a module of the model has been entered so many times."""

    def __init__(self) -> None:
        self.left = 0

    def __call__(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            raise Broken


class Truth:
    """Two sets of weights for a tiny model; `expected` is what it computes in one pass, with no cache."""

    def __init__(self, name: str) -> None:
        with in_double():
            self.versions = [self._made(name, seed) for seed in (0, 1)]
        self._known: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    @staticmethod
    def _made(name: str, seed: int) -> Any:
        model: Any = tiny_models.sharp(name).double()
        model.generation_config.eos_token_id = None
        for module in model.modules():
            if getattr(module, "config", None) is not None:
                module.config._experts_implementation = "eager"  # there is no grouped product of float64
            # Transformers' scans of Mamba 2 bound each time step, and its update by one token does not. Without bounds
            # it does not matter how tokens are split into passes.
            if hasattr(module, "time_step_limit"):
                module.time_step_limit = (0.0, float("inf"))
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            for weight in model.parameters():
                weight += seed * 0.1 * torch.randn(weight.shape, generator=generator)
        return model

    @torch.inference_mode()
    def expected(self, version: int, ids: Sequence[int]) -> Tensor:
        """Logits [tokens, vocabulary]."""
        key = version, tuple(ids)
        if key not in self._known:
            self._known[key] = self.versions[version](torch.tensor([ids]), use_cache=False).logits[0]
        return self._known[key]


@cache
def truth_of(name: str) -> Truth:
    return Truth(name)


class Model:
    """The model that one process serves, with one or the other set of weights."""

    def __init__(self, name: str) -> None:
        self.truth = truth_of(name)
        with in_double():
            self.served: Any = copy.deepcopy(self.truth.versions[0])
        self.version = 0
        self.by_one = goes_on_by_one(type(self.served))
        self.breaker = Breaker()
        for module in self.served.modules():
            if not list(module.children()):
                module.register_forward_pre_hook(self.breaker)

    def renew(self, version: int) -> None:
        self.version = version
        self.served.load_state_dict(self.truth.versions[version].state_dict())

    def expected(self, ids: Sequence[int]) -> Tensor:
        """Logits [tokens, vocabulary] with the weights that it has now."""
        return self.truth.expected(self.version, ids)


@cache
def model_of(name: str, process: int = 0) -> Model:
    return Model(name)


def same(got: Tensor, expected: Tensor, what: object) -> None:
    assert got.dtype == expected.dtype == torch.float64
    off = float((got - expected).abs().max())
    assert off < NOISE, f"{what}: logits are off by {off}"


def marked(ids: Sequence[int], extra: Extra) -> list[Any]:
    """Tokens with what they stand for beyond their ids."""
    text: list[Any] = list(ids)
    for position, data in extra:
        text[position] = ids[position], data
    return text


def alike(first: Sequence[Any], second: Sequence[Any]) -> int:
    for number, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return number
    return min(len(first), len(second))


class World:
    """A model, a pool of it, and who runs on that: `Talk` and `Held`, each of which does one thing at a `turn`."""

    distances: Sequence[int] = (4, 8, 12)  # tokens from one checkpoint to the next
    resets = 0.02  # how many turns end with one
    sizes_of_passes: Sequence[int] = (3, 7, 16, 64)  # tokens of generations

    def __init__(self, name: str, rng: Random, process: int = 0) -> None:
        self.name, self.rng, self.model = name, rng, model_of(name, process)
        self.model.renew(0)
        self.prefixes = [self.tokens(rng.choice([9, 17, 25])) for _ in range(2)]
        self.chats = [self.chat() for _ in range(4)]
        # By salt, what may be found of prompts: all that was computed with these weights.
        self.told: dict[bytes, list[list[Any]]] = {salt: [] for salt in SALTS}
        self.batches: list[tuple[list[list[int]], list[int], bytes, Extra]] = []  # that caches have computed
        self.actors: list[Talk | Held] = []
        self.acting: Talk | Held | None = None  # whose turn it is
        # Of models that hold offsets of positions themselves caches take no prompts.
        self.kinds = [Talk] if keeps_offsets(self.model.served.config) else [Talk, Talk, Held]
        self.seen: Counter[str] = Counter()
        self.open()

    def open(self) -> None:
        """Make a pool."""
        self.every = self.rng.choice(self.distances)
        self.pool = self.made_pool()
        self.manager = self.pool.manager
        self.pins: list[tuple[int, list[int], dict[str, Any], int]] = []

    def made_pool(self, **options: Any) -> Pool:
        rng, groups = self.rng, len(cache_groups(self.model.served.config, chunks=False))
        sizes: dict[str, Any] = {
            "num_blocks": rng.choice([18, 24, 40, 96]) * groups,
            "num_states": rng.choice([1, 2, 3, 4, 6, 12]),
            "host_memory": rng.choice([None, None, "200KiB", "2MiB"]),
        }
        return Pool(self.model.served, block_size=BLOCK, state_every=self.every, **(sizes | options))

    def tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(3, tiny_models.VOCABULARY) for _ in range(count)]

    def chat(self) -> list[int]:
        return self.rng.choice(self.prefixes) + self.tokens(self.rng.randrange(1, 12))

    def goes_on(self, number: int, chat: list[int]) -> None:
        """A chat comes back with more, or another takes its place."""
        longer = chat + self.tokens(self.rng.randrange(1, 6))
        self.chats[number] = longer if len(longer) <= LONGEST - 12 else self.chat()

    def extra(self, length: int) -> Extra:
        """What the tokens of a prompt stand for, most often no more than their ids say."""
        extra = self.rng.choice([()] * 9 + EXTRAS)
        return tuple(pair for pair in extra if pair[0] < length)

    def texts(self) -> dict[bytes, list[list[Any]]]:
        """By salt, what generations that run have so far."""
        found: dict[bytes, list[list[Any]]] = {salt: [] for salt in SALTS}
        for actor in self.actors:
            if isinstance(actor, Talk):
                for stream, text in actor.texts():
                    found[stream.request.salt].append(marked(text, stream.request.extra))
        return found

    def texts_of_all(self) -> list[dict[bytes, list[list[Any]]]]:
        """`texts` of everyone with these weights whose blocks may be found."""
        return [self.texts()]

    def tell(self, salt: bytes, ids: list[int], extra: Extra = ()) -> int:
        """A prompt comes. What is found of it was computed under its salt, for what it stands for, with these weights.

        Returns:
            How many of its tokens may be found, wherever they are.
        """
        running = self.texts_of_all()
        known: dict[tuple[bytes, Extra], int] = {}
        for other in SALTS:
            texts = [*self.told[other], *(text for each in running for text in each[other])]
            for marks in {tuple(pair for pair in each if pair[0] < len(ids)) for each in EXTRAS}:
                most = known[other, marks] = max((alike(marked(ids, marks), text) for text in texts), default=0)
                found = self.manager.match(ids, salt=other, extra=marks)
                assert found <= most, f"{found} tokens were found of {ids} {marks} under {other!r}, of {most} computed"
        self.told[salt].append(marked(ids, extra))
        self.seen["marked prompts"] += bool(extra)
        return known[salt, extra]

    def given(self) -> dict[str, Any]:
        """What else there is to a prompt that is to be pinned."""
        return {"salt": self.rng.choice([b"", b"", b"a"]), "extra": self.extra(9)}

    def pin(self) -> None:
        """Keep what is there of a chat."""
        ids, given = self.rng.choice(self.chats), self.given()
        try:
            handle = self.manager.pin(ids, **given)
        except ValueError:  # nothing is there
            return
        self.seen["pins"] += 1
        self.pins.append((handle, ids, given, self.manager.num_resets))

    def unpin(self) -> None:
        """Let go of all pins; what they held, up to a checkpoint, is there still, if there was no reset."""
        pins, self.pins = self.pins, []
        for _, ids, given, resets in pins:
            if resets == self.manager.num_resets:
                found = self.manager.match([*ids, 0], **given)
                assert found >= self.every, f"{found} tokens are found of {ids}, which was pinned"
        for handle, *_ in pins:
            self.manager.unpin(handle)

    def reset(self) -> None:
        """New weights. What caches hold is of the old ones, so that they must begin anew."""
        self.seen["resets"] += 1
        talks = [actor for actor in self.actors if isinstance(actor, Talk)]
        for talk in talks:
            talk.run.reset_prefix_cache()
        self.renew(1 - self.model.version, was_reset=bool(talks))
        for actor in self.actors:
            if isinstance(actor, Held):
                actor.stale = True
        for talk in talks:
            for request in talk.requests:
                self.told[request.salt].append(marked(request.prompt, request.extra))

    def renew(self, version: int, *, was_reset: bool) -> None:
        """Go on with other weights."""
        if not was_reset:
            self.pool.reset_prefix_cache()
        self.told = {salt: [] for salt in SALTS}
        self.model.renew(version)

    def make_room(self, actor: "Talk | Held") -> bool:
        """Let go of pins, or end all others; False where there is neither."""
        if self.pins:
            self.unpin()
            return True
        others = [other for other in self.actors if other is not actor]
        for other in others:
            other.end()
        self.seen["rooms made"] += bool(others)
        return bool(others)

    def turn(self) -> None:
        self.acting = None
        if len(self.actors) < 3 and self.rng.random() < 0.3:
            self.actors.append(self.rng.choice(self.kinds)(self))
        if self.actors:
            self.model.breaker.left = self.rng.choice([0] * 7 + [self.rng.randrange(1, 120)])
            self.acting = self.rng.choice(self.actors)
            self.acting.turn()
            self.model.breaker.left = 0
        event = self.rng.random()
        if event < 0.04:
            self.pin()
        elif event < 0.07:
            self.unpin()
        elif event < 0.07 + self.resets:
            self.reset()
        self.manager.audit()

    def end(self) -> None:
        """Everyone leaves, and nothing stays held."""
        for actor in list(self.actors):
            actor.end()
        self.unpin()
        self.manager.audit()
        assert self.manager.num_free_blocks == self.manager.num_blocks
        assert self.manager.num_free_states == self.manager.num_states
        stats = self.manager.stats()
        for name in ("preemptions", "checkpoints", "checkpoint_evictions", "state_copies", "host_hit_tokens"):
            self.seen[name] += getattr(stats, name)


class Talk:
    """A run of `kvblocks.generate` over a few of the chats, pass by pass."""

    def __init__(self, world: World) -> None:
        self.world, rng = world, world.rng
        self.numbers = rng.sample(range(len(world.chats)), rng.choice([1, 2, 3, 4]))
        self.scores: list[tuple[int, list[int], Tensor]] = []
        self.requests = [self.request(world.chats[number]) for number in self.numbers]
        self.run = kvblocks.generate(
            world.model.served,
            self.requests,
            pool=world.pool,
            max_batch_tokens=rng.choice(world.sizes_of_passes),
            max_seqs=rng.choice([2, 64]) if all(request.n == 1 for request in self.requests) else 64,
        )
        self.streams = list(self.run)

    def request(self, chat: list[int]) -> Request:
        rng, world = self.world.rng, self.world
        settings: dict[str, Any] = {"salt": rng.choice([b"", b"", b"a"]), "priority": rng.choice([0, 0, 1])}
        settings["extra"] = world.extra(len(chat))
        if rng.random() < 0.3:
            most = min(3, world.manager.num_states)
            settings |= {"temperature": 1.0, "n": rng.randrange(1, most + 1), "seed": rng.randrange(99)}
        world.tell(settings["salt"], chat, settings["extra"])
        world.seen["prompts"] += 1
        world.seen["answers"] += settings.get("n", 1)
        return Request(tuple(chat), rng.randrange(2, 11), logits_processors=(self.keep,), **settings)

    def keep(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.scores.append((self.world.model.version, ids[0].tolist(), scores[0].clone()))
        self.world.model.breaker()
        return scores

    def turn(self) -> None:
        world, rng = self.world, self.world.rng
        event = rng.random()
        if event < 0.02:
            rng.choice(self.streams).cancel()
            world.seen["cancelled"] += 1
        elif event < 0.05 and len(self.requests) < 6:
            self.requests.append(self.request(rng.choice(world.chats)))
            if self.requests[-1].n <= self.run.scheduler.max_seqs:
                self.streams += self.run.add(self.requests[-1]).answers
        elif self.run.num_unfinished:
            self.step()
        else:
            self.end()

    def step(self) -> None:
        try:
            self.run.step()
            self.world.seen["passes"] += 1
        except Broken:
            self.world.seen["failed passes"] += 1
        except (NoFreeBlocks, NoFreeStates):
            if not self.world.make_room(self):
                raise

    def end(self) -> None:
        self.world.actors.remove(self)
        self.run.close()
        scheduler, seen = self.run.scheduler, self.world.seen
        seen["hit tokens"] += scheduler.num_hit
        seen["hit tokens from stores"] += sum(scheduler.num_hit_by_store)
        seen["hit tokens after preemption"] += scheduler.num_hit_again
        texts = self.texts()
        for stream, text in texts:
            self.world.told[stream.request.salt].append(marked(text, stream.request.extra))
        for version, ids, scores in self.scores:
            [longest, *_] = [text for _, text in texts if text[: len(ids)] == ids]
            same(scores, self.world.model.truth.expected(version, longest)[len(ids) - 1], ids)
        seen["logits compared"] += len(self.scores)
        for number, (stream, text) in zip(self.numbers, texts, strict=False):
            if stream.finish == "length":
                self.world.goes_on(number, text)

    def texts(self) -> list[tuple[Any, list[int]]]:
        """Each stream with its prompt and answer so far."""
        return [(stream, [*stream.request.prompt, *stream.tokens]) for stream in self.streams]


class Held:
    """A PagedCache, through which the model is called as transformers' users do; rows may be padded on the left."""

    def __init__(self, world: World, cache: PagedCache | None = None) -> None:
        self.world = world
        self.cache = PagedCache(world.model.served.config, pool=world.pool) if cache is None else cache
        self.ids: list[list[int]] = []  # of each row with its padding, those that come next too
        self.pads: list[int] = []
        self.spoiled: set[int] = set()  # rows of which padding was computed as if it were a token
        self.salt = b""
        self.extra: Extra = ()  # of each row, counted from its first token
        self.held = self.before = 0  # columns; before the newest pass
        self.prompt = 0  # columns
        self.stale = False  # nothing may go on from what is held
        if cache is None:
            if world.name != "zaya" and world.rng.random() < 0.3:  # whose own passes fail then
                self.cache.activate_past_recording()
            self.begin()

    def end(self) -> None:
        self.world.actors.remove(self)
        self.cache.close()

    def own(self, columns: int) -> list[list[int]]:
        """The tokens of each row in so many columns, without padding."""
        return [row[pad:columns] for row, pad in zip(self.ids, self.pads, strict=True)]

    def mask(self, columns: int) -> Tensor:
        return (torch.arange(columns) >= torch.tensor(self.pads)[:, None]).long()

    def place(self, chats: Sequence[list[int]]) -> None:
        """Make rows of the beginnings of chats: of one length, or with padding that may let them be found together."""
        world, rng = self.world, self.world.rng
        pads = [0] * len(chats)
        kind = rng.choice(["none", "none", "equal", "grid", "any"])
        if kind == "equal":
            pads = [rng.randrange(1, 9)] * len(chats)
        elif kind == "grid":
            first = rng.randrange(3)
            pads = [first + world.every * rng.randrange(3) for _ in chats]
        elif kind == "any":
            pads = [rng.randrange(10) for _ in chats]
        columns = min(LONGEST - 8, *(len(chat) + pad for chat, pad in zip(chats, pads, strict=True)), 99)
        if columns - max(pads) < 3:
            pads, columns = [0] * len(chats), min(LONGEST - 8, *map(len, chats), 99)
        beyond = (columns - pads[0]) % world.every
        if columns - beyond - max(pads) >= 3 and rng.random() < 0.5:
            columns -= beyond  # the prompts leave checkpoints
        self.pads = pads
        self.ids = [[0] * pad + chat[: columns - pad] for chat, pad in zip(chats, pads, strict=True)]

    def place_again(self) -> None:
        """Make rows of those that were computed together before, and more."""
        world, rng = self.world, self.world.rng
        batch, pads, self.salt, self.extra = rng.choice(world.batches)
        more, shift = world.tokens(rng.randrange(2, 6)), rng.choice([0, 0, 1, 4])
        if len(batch[0]) + pads[0] + len(more) + shift > LONGEST - 8:
            more, shift = [], 0
        self.pads = [pad + shift for pad in pads]
        self.ids = [[0] * pad + row + more for row, pad in zip(batch, self.pads, strict=True)]

    def begin(self) -> None:
        world, rng = self.world, self.world.rng
        goes_on = bool(self.ids) and self.held > max(self.pads) and rng.random() < 0.5
        if goes_on:
            length = min(LONGEST - 8, self.held + 4)
            self.ids = [(row[: self.held] + world.tokens(4))[:length] for row in self.ids]
        elif world.batches and rng.random() < 0.5:
            self.place_again()
        else:
            self.place(rng.sample(world.chats, rng.choice([1, 2, 2])))
            self.salt, self.extra = rng.choice([b"", b"", b"a"]), world.extra(min(map(len, self.own(LONGEST))))
        rows = self.own(LONGEST)
        self.extra = tuple(pair for pair in self.extra if pair[0] < min(map(len, rows)))
        if not (found := self.told_prompts(rows, reuse=rng.random() < 0.9, had=self.held if goes_on else 0)):
            self.stale = True
            return
        self.spoiled = self.spoiled if goes_on and found[0] == self.held else set()
        [self.held] = found
        self.before, self.prompt, self.stale = self.held, len(self.ids[0]), False

    def told_prompts(self, rows: list[list[int]], *, reuse: bool, had: int = 0) -> list[int]:
        """Tell the cache its prompts; the columns that it found, nothing where there was no room.

        Args:
            had: columns of them that it held before.
        """
        world = self.world
        known = [world.tell(self.salt, row, self.extra) for row in rows]
        extra = [[(pad + position, data) for position, data in self.extra] for pad in self.pads]
        try:
            mask = self.mask(len(self.ids[0]))
            found = self.cache.begin(torch.tensor(self.ids), mask, salt=self.salt, extra=extra, reuse=reuse)
        except NoFreeBlocks:
            return []
        tokens = [max(0, found - pad) for pad in self.pads]
        for row, count, most in zip(rows, tokens, known, strict=True):
            assert found <= had or count <= most, f"{count} tokens were found of {row}, of {most} computed"
        world.seen["prompts begun"] += len(rows)
        world.seen["begun at checkpoints"] += sum(count > 0 for count in tokens)
        world.seen["begun tokens found"] += sum(tokens)
        world.seen["padded rows found"] += sum(count > 0 < pad for count, pad in zip(tokens, self.pads, strict=True))
        world.seen["rows of several paddings found"] += (len({*self.pads}) > 1) * sum(count > 0 for count in tokens)
        return [found]

    def turn(self) -> None:
        rng = self.world.rng
        if self.stale:
            self.begin() if rng.random() < 0.7 else self.end()
            return
        actions: list[Callable[[], None]] = [self.feed] * 8
        if self.held >= self.prompt:
            actions += [self.tell, self.reorder, self.fork, self.crop, self.end, self.generate, self.generate]
        rng.choice(actions)()

    def columns(self) -> int:
        """How many come next; a scan of Mamba 1 begins at no state."""
        rng, left = self.world.rng, self.prompt - self.held
        if left <= 0:
            return 1 if self.world.model.by_one else rng.choice([1, 1, 1, 3])
        if self.world.model.by_one:
            return left if self.held <= min(self.pads) else 1
        if self.held < max(self.pads) and rng.random() < 0.1:
            return 1
        grid = self.world.every - (self.held - self.pads[0]) % self.world.every
        return max(min(2, left), min(left, rng.choice([grid, grid, 5, left])))

    def feed(self) -> None:
        world, count = self.world, self.columns()
        after = self.held + count
        if after > LONGEST:
            self.end()
            return
        for row in self.ids:
            row += world.tokens(after - len(row))
        ids = torch.tensor([row[self.held : after] for row in self.ids])
        given: dict[str, Any] = {cache_argument(world.model.served.forward): self.cache, "use_cache": True}
        positions = torch.arange(self.held, after) - torch.tensor(self.pads)[:, None]
        given |= {"position_ids": positions.clamp(min=0), "attention_mask": self.mask(after)}
        try:
            with torch.inference_mode():
                logits = world.model.served(ids, **given).logits
        except Broken:
            world.seen["passes of caches failed"] += 1
            if world.rng.random() < 0.3:
                self.stale = True  # whoever comes next on the pool, or `begin`, takes the pass back
                return
            self.cache.abort()
            # Where the model failed before its first layer the pass before that is taken back, which was still open.
            assert self.cache.get_seq_length() in (self.before, self.held)
            self.held = self.cache.get_seq_length()
            return
        except NoFreeBlocks:
            if not world.make_room(self):
                self.end()
            return
        if count == 1:  # transformers takes a column that comes alone for a token of each row
            self.spoiled |= {number for number, pad in enumerate(self.pads) if pad > self.held}
            world.seen["padding taken for tokens"] += max(self.pads) > self.held
        for number, (row, pad, line) in enumerate(zip(self.own(after), self.pads, logits, strict=True)):
            first = max(self.held, pad)
            if first < after and number not in self.spoiled:
                same(line[first - self.held :], world.model.expected(row)[first - pad :], row)
                world.seen["logits compared"] += after - first
        world.seen["passes of caches"] += 1
        self.before, self.held = self.held, after
        if after == self.prompt:
            world.batches = [*world.batches[-3:], (self.own(after), self.pads, self.salt, self.extra)]

    def tell(self) -> None:
        """The tokens that were fed are known from here on, and the next prompts go on from them."""
        try:
            self.cache.tell(torch.tensor([row[: self.held] for row in self.ids]))
            self.world.seen["told"] += 1
            self.world.told[self.salt] += [marked(row, self.extra) for row in self.own(self.held)]
        except ValueError as error:
            if not any(text in str(error) for text in ("was shared between beams", "no prompt was told")):
                raise
        self.begin()

    def reorder(self) -> None:
        chosen = [self.world.rng.randrange(len(self.ids)) for _ in self.ids]
        self.cache.reorder_cache(torch.tensor(chosen))
        self.before = self.held
        self.ids = [list(self.ids[number]) for number in chosen]
        self.pads = [self.pads[number] for number in chosen]
        self.spoiled = {number for number, old in enumerate(chosen) if old in self.spoiled}
        self.world.seen["reordered"] += 1

    def fork(self) -> None:
        other = Held(self.world, self.cache.fork())
        self.before = self.held
        other.__dict__.update(vars(self) | {"cache": other.cache, "ids": [list(row) for row in self.ids]})
        self.world.actors.append(other)
        self.world.seen["forks"] += 1

    def crop(self) -> None:
        dropped = min(self.world.rng.randrange(1, 4), self.held - max(self.pads) - 1)
        self.before = self.held
        try:
            self.cache.crop(-dropped)
        except ValueError as error:
            if not any(text in str(error) for text in ("recurrent state", "convolutions hold", "windows have moved")):
                raise
            return
        self.before = self.held = self.held - dropped
        self.prompt = min(self.prompt, self.held)
        self.ids = [row[: self.held] for row in self.ids]
        self.world.seen["crops"] += 1

    def generate(self) -> None:
        """`model.generate` over prompts that are begun here: as it is, with beams, or assisted where it can be cut."""
        world, rng, served = self.world, self.world.rng, self.world.model.served
        kind = rng.choice(["plain", "beams", "assisted"] if self.cache.is_croppable else ["plain", "beams"])
        if kind == "assisted":
            self.ids, self.pads = [list(rng.choice(world.chats))], [0]
        else:
            self.place(rng.sample(world.chats, rng.choice([1, 2, 2])))
        ids, self.salt = torch.tensor(self.ids), rng.choice([b"", b"a"])
        mask = self.mask(ids.shape[1])
        rows = self.own(LONGEST)
        self.extra = world.extra(min(map(len, rows)))
        options: dict[str, Any] = {"max_new_tokens": rng.randrange(2, 7), "do_sample": False, "pad_token_id": 0}
        options |= {"attention_mask": mask, "return_dict_in_generate": True, "output_logits": True}
        options |= {"plain": {}, "beams": {"num_beams": 2}, "assisted": {"prompt_lookup_num_tokens": 2}}[kind]
        if not world.model.by_one and kind != "assisted" and rng.random() < 0.5:
            options["prefill_chunk_size"] = world.every
        self.stale, self.held = True, 0
        if kind == "beams":  # each row is told as often as it has beams
            twice = [row for row in range(len(rows)) for _ in range(2)]
            self.ids, self.pads = [self.ids[row] for row in twice], [self.pads[row] for row in twice]
            rows = [rows[row] for row in twice]
        try:
            if not self.told_prompts(rows, reuse=kind != "assisted"):
                world.make_room(self)
                return
            out = served.generate(ids, cache=self.cache, **options)
        except Broken:
            self.cache.abort()
            world.seen["passes of caches failed"] += 1
            return
        except NoFreeBlocks:
            self.cache.abort()
            world.make_room(self)
            return
        made = out.sequences.tolist()
        world.seen[f"model.generate: {kind}"] += 1
        world.seen["padded rows generated"] += sum(pad > 0 for pad in self.pads)
        if kind == "beams":
            own = world.model.truth.versions[world.model.version].generate(ids, **options)
            assert made == own.sequences.tolist(), (made, own.sequences, out.sequences, options)
            return
        for number, (row, pad) in enumerate(zip(made, self.pads, strict=True)):
            expected = world.model.expected(row[pad:])[ids.shape[1] - pad - 1 : -1]
            same(torch.stack([step[number] for step in out.logits]), expected, row)
            world.seen["logits compared"] += len(expected)
        if kind == "plain":
            self.cache.tell(out.sequences)
            world.told[self.salt] += [marked(row[pad:], self.extra) for row, pad in zip(made, self.pads, strict=True)]
