"""The rows of a batch as sequences of a block manager: what a cache for transformers is made of, without its layers.

Transformers counts in columns: every row of a batch has as many, and those on the left may be padding. Here a row is a
sequence of its own tokens, and padding takes no slot. Imports torch and the manager.
"""

import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvblocks.integrations.transformers.blocks import Blocks
from kvblocks.integrations.transformers.passes import Ids, Pass, Prompt, Row
from kvblocks.integrations.transformers.states import LayerStates, States
from kvblocks.tiers.names import PRIVATE_SALT

# Columns that follow those whose states are found: of one alone models think that it was generated, and do not take the
# states of one row for several.
_AFTER_STATES = 2
_MOST_RECORDED = 6  # passes between two crops, where layers have windows: a manager has 8 steps open by default

__all__ = ["Rows"]


class Rows:
    """The rows of one cache, and what a cache does with all of them at once.

    A call that raises leaves them as they were, `begin` excepted, which leaves none.
    """

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self.rows: list[Row] = []
        self.columns = 0
        self.factor = 1  # rows of the batch that each row stands for, as long as they hold the same
        self.running: Pass | None = None
        self.states = States()
        self.parts: frozenset[tuple[int, str]] = frozenset()  # layers, and what they keep: "update", "index", "state"
        self._calls: dict[tuple[int, str], None] = {}  # of this pass, where there are states
        self.recording = False  # whether passes may be cut by `crop`, however far their windows moved on
        self._recorded: list[Pass] = []
        self._prompts: list[Prompt] = []
        self._skipped = 0  # columns of the told prompts that need not be computed
        self.goes_on = True  # whether a pass of several columns may go on from states
        self._resets = 0  # of the manager's prefix cache, when these rows were begun

    # Passes

    def enter(self, layer: int, call: str) -> bool:
        """A layer reads or writes what it keeps; False where it has done so in a pass that has not come to its end.

        Kernels write states in place, and nobody says when the last one has. So where there are states a pass ends when
        the next one begins, or something is done between passes.
        """
        if not self.states:
            return True
        if (layer, call) in self._calls and not self.settled():
            return False
        if not self._calls:
            self.states.begin()
        self._calls[layer, call] = None
        return True

    def settled(self) -> bool:
        """Whether no pass is half done; one that has come to its end counts from here on."""
        if self._complete():
            self._calls = {}
            self.finish()
        return self.running is None and not self._calls

    def _complete(self) -> bool:
        """Whether the running pass has been in all layers, and nobody was told of its end."""
        if self.running is None or self.running.dropped or not self._calls:
            return False
        return self.parts <= {(layer, call.partition(" ")[0]) for layer, call in self._calls}

    def open(self, batch: int, count: int, device: torch.device) -> Pass:
        """Begin a pass over `count` new columns: a slot for each of its tokens.

        Raises:
            ValueError: `batch` is not the number of rows, nor a multiple of it where the rows are a told prompt; or a
                prompt of which a part was found comes whole.
            NoFreeBlocks: the pool has not enough.
        """
        told = max((prompt.pad + len(prompt.ids) for prompt in self._prompts), default=0)
        if self._skipped and self.columns < told < self.columns + count:
            raise ValueError(
                f"{count} columns come, and {told - self.columns} of the prompt are left, as begin found "
                f"{self._skipped}; what computes a prompt whole (as assisted generation does) needs "
                "begin(..., reuse=False)"
            )
        self.blocks.begin(self)
        fresh = not self.rows
        if len(self._recorded) >= _MOST_RECORDED:
            self.settle()
        try:
            if fresh:
                self._admit_unknown(batch)
            self._spread(batch, count)
            if self.states and count == 1:
                self._set_apart()
            saved = [replace(row) for row in self.rows]
            try:
                self.running = self._prepare(batch, count, device)
            except BaseException:
                self._restore(saved)
                raise
        except BaseException:
            self.blocks.running = None
            if fresh:
                self.clear()
            raise
        self.running.saved = None if fresh else saved
        return self.running

    def finish(self) -> None:
        """The running pass is done: its tokens count."""
        done, self.running, self.blocks.running = self.running, None, None
        assert done is not None
        self.states.keep()
        if done.checkpoints:
            self._keep_states(done)
        self.columns += done.count
        if done.step_id is None:
            return
        if self.recording and any(reach is not None for reach in self.blocks.manager.groups):
            # A commit gives blocks back that the windows have left; until then it can still be cut.
            self._recorded.append(done)
            self.blocks.recorded = self
        else:
            self.blocks.manager.commit(done.step_id)

    def _keep_states(self, done: Pass) -> None:
        """Put what a pass has made of states into the slots of its checkpoints."""
        fields = self.states.minimal()
        kept = self.blocks.slots_for([LayerStates.of(of_layer) for of_layer in fields])
        rows, slots = torch.tensor(done.checkpoints, device=done.slots.device).unbind(1)
        kept.write(slots, fields, rows * self.factor)

    def settle(self, columns: int | None = None) -> None:
        """No pass before this is cut any more; those that were recorded keep the first `columns` columns, or all."""
        recorded, self._recorded = self._recorded, []
        if self.blocks.recorded is self:
            self.blocks.recorded = None
        while recorded and columns is not None and recorded[-1].before >= columns:
            newest = recorded.pop()
            assert newest.step_id is not None
            self.blocks.manager.abort(newest.step_id)
        for run in recorded:
            assert run.step_id is not None
            accepted = None
            if columns is not None and run is recorded[-1]:
                # Only rows that had new tokens are in the step.
                olds = run.saved if run.saved is not None else [Row(row.handle, row.pad) for row in self.rows]
                news = [(old.computed, old.at(run.before + run.count), old.at(columns)) for old in olds]
                accepted = [max(0, end - old) for old, after, end in news if after > old]
            self.blocks.manager.commit(run.step_id, accepted)

    def abort(self) -> None:
        """Take the running pass back, if there is one: as if it had never begun."""
        self._take_back()
        self.running, self._calls = None, {}
        self.states.restore()

    def drop(self) -> None:
        """`abort`, but the pass stays to be seen as one that was dropped, unless it has come to its end."""
        if self._complete():
            self.settled()
        else:
            self._take_back()

    def _take_back(self) -> None:
        run = self.running
        if self.blocks.running is self:
            self.blocks.running = None
        if run is None or run.dropped:
            return
        run.dropped = True
        if run.step_id is not None:
            self.blocks.manager.abort(run.step_id)
        if run.saved is None:
            self.clear()
        else:
            self._restore(run.saved)

    def _admit_unknown(self, batch: int) -> None:
        """Rows of tokens whose ids nobody told; the salt keeps them apart from all others."""
        for _ in range(batch):
            handle, _ = self.blocks.manager.admit([0], salt=PRIVATE_SALT + os.urandom(16), reserve=0)
            self.rows.append(Row(handle, 0, total=1, known=1))
        self.factor = 1

    def _spread(self, batch: int, count: int) -> None:
        """Settle how many rows of the batch each row stands for; copies share all blocks."""
        factor, rest = divmod(batch, len(self.rows))
        if rest or (factor != self.factor and (self.factor != 1 or not self._holds_prompt_only())):
            raise ValueError(f"the batch has {batch} rows, the cache {len(self.rows) * self.factor}")
        self.factor = factor
        if factor > 1 and any(row.at(self.columns + count) > row.real for row in self.rows):
            self.settle()
            self.select([row for row in range(len(self.rows)) for _ in range(factor)])

    def _set_apart(self) -> None:
        """Let nobody share the rows of which a pass over one column computes padding.

        Transformers hides padding from states in passes over several columns. A column that comes alone is taken for a
        token of the row, whatever the mask says.
        """
        for row, prompt in zip(self.rows, self._prompts, strict=False):
            if row.pad > self.columns:
                self.blocks.manager.free([row.handle])
                salt = PRIVATE_SALT + os.urandom(16)
                row.handle, _ = self.blocks.manager.admit(prompt.ids, salt=salt, extra=prompt.extra, reserve=0)

    def _holds_prompt_only(self) -> bool:
        return all(row.real == row.total for row in self.rows)

    def _prepare(self, batch: int, count: int, device: torch.device) -> Pass:
        manager, block_size = self.blocks.manager, self.blocks.manager.block_size
        after = self.columns + count
        missing = [max(0, row.at(after) - row.total) for row in self.rows]
        if any(missing):
            manager.extend([row.handle for row in self.rows], None, missing)
            for row, number in zip(self.rows, missing, strict=True):
                row.total += number
        news = [max(0, row.at(after) - row.computed) for row in self.rows]
        taking = [(row, new) for row, new in zip(self.rows, news, strict=True) if new]
        num_blocks = max(1, *(-(-row.at(after) // block_size) for row in self.rows))
        groups = len(manager.groups)
        step_id, slots, tables = None, torch.empty(groups, 0, dtype=torch.int64, device=device), None
        checkpoints: list[tuple[int, int]] = []
        if taking:
            widest = max(-(-row.total // block_size) for row, _ in taking)  # a told prompt has its blocks reserved
            step = self.blocks.buffers(len(taking), sum(news), widest, device)
            # States stay in transformers' layers, as a pass that has failed must leave no trace.
            own = {"own_state": True} if manager.num_states else {}
            step_id = manager.prepare([row.handle for row, _ in taking], [new for _, new in taking], step, **own)
            slots = step.slot_mapping.view(groups, -1)[:, : step.num_tokens]
            tables = step.block_table.view(groups, step.max_seqs, -1)[:, : step.num_seqs, :num_blocks]
            tables = tables.clamp(min=0)  # padding is gathered too, and masked afterwards
        try:
            if step_id is not None:
                self.blocks.move(step)
                every = manager.state_every
                if step.state_drafts is not None and any((row.computed + new) % every == 0 for row, new in taking):
                    last = step.state_drafts[step.query_start_loc[1 : step.num_seqs + 1].long() - 1].tolist()
                    numbers = [number for number, new in enumerate(news) if new]
                    checkpoints = [(row, slot) for row, slot in zip(numbers, last, strict=True) if slot >= 0]
            if tables is None or len(taking) < len(self.rows):
                tables = self._tables(num_blocks, device)
            for row, new in taking:
                row.computed += new
            chosen = None
            if any(new != count for new in news):
                ends = range(count, (len(self.rows) + 1) * count, count)
                parts = [np.arange(end - new, end) for end, new in zip(ends, news, strict=True)]
                chosen = torch.from_numpy(np.concatenate(parts)).to(device)
            gathered_at = padding = None
            if any(row.pad for row in self.rows):
                pads = torch.tensor([row.pad for row in self.rows], device=device)[:, None]
                tokens = torch.arange(after, device=device) - pads
                padding = tokens < 0
                starts = torch.arange(len(self.rows), device=device)[:, None] * (num_blocks * block_size)
                gathered_at = starts + tokens.clamp(min=0)
        except BaseException:
            if step_id is not None:
                manager.abort(step_id)
            raise
        return Pass(
            batch, self.factor, self.columns, count, slots, tables, chosen, gathered_at, padding, step_id, checkpoints
        )

    def _tables(self, num_blocks: int, device: torch.device) -> Tensor:
        """The block tables of all rows, those too that take no part in the step; 0 pads."""
        tables = np.zeros((len(self.blocks.manager.groups), len(self.rows), num_blocks), np.int32)
        for number, row in enumerate(self.rows):
            blocks = self._blocks(row)[:, :num_blocks]
            tables[:, number, : blocks.shape[1]] = blocks.clip(min=0)
        return torch.from_numpy(tables).to(device)

    def _blocks(self, row: Row) -> npt.NDArray[np.int32]:
        """[groups, blocks] of a row; -1 where they are out of reach."""
        return np.atleast_2d(self.blocks.manager.block_table(row.handle))

    @property
    def num_told(self) -> int:
        """Prompts that `begin` was told, 0 where it was not called."""
        return len(self._prompts)

    def held_blocks(self) -> int:
        """Blocks that the rows hold, each counted once."""
        tables = [self._blocks(row).ravel() for row in self.rows]
        return len(np.setdiff1d(np.concatenate(tables), [-1])) if tables else 0

    def _restore(self, saved: list[Row]) -> None:
        for row, old in zip(self.rows, saved, strict=True):
            if self._recorded:
                old.total = row.total  # the sequence is in an open step; placeholders stay for the next pass
            elif row.total != old.total:
                self.blocks.manager.trim(row.handle, old.total)
        self.rows = saved

    # Prompts

    def begin(self, prompts: Sequence[Prompt], *, reuse: bool, positions: Tensor | None = None) -> None:
        """Hold these prompts instead; what is computed of all of them, from the first column on, counts as there.

        Args:
            positions: [kinds of position, rows, columns] of the prompts, where layers may go by them.

        Raises:
            NoFreeBlocks, TooManySequences: the pool cannot hold them; then nothing is held.
        """
        self.abort()
        self.settle()
        manager = self.blocks.manager
        # What was computed before a reset belongs to other weights, in these rows too.
        stale = self._resets != manager.num_resets
        self._resets = manager.num_resets
        if stale:
            kept: list[Row | None] = [None] * len(prompts)
        elif self.states:
            kept = self._continued_whole(prompts) if reuse else [None] * len(prompts)
        else:
            kept = [self._continued(number, prompt) for number, prompt in enumerate(prompts)]
        gone = [row.handle for row, keep in zip(self.rows, kept, strict=False) if keep is None]
        gone += [row.handle for row in self.rows[len(prompts) :]]
        self.rows = [row for row in kept if row is not None]
        self._prompts, self.columns, self.factor, self._skipped = [], 0, 1, 0
        manager.free(gone)
        if None in kept:
            self.states.clear()
        columns = 0
        try:
            if reuse and self.states and None in kept:
                columns = self._columns_with_states(prompts)
            for number, (row, prompt) in enumerate(zip(kept, prompts, strict=True)):
                if row is None:
                    most = max(0, columns - prompt.pad) if self.states else None
                    handle, cached = self.blocks.admit(prompt, max_hit=most, fetches=reuse and not self.states)
                    row = Row(handle, prompt.pad, cached)
                    self.rows.insert(number, row)
                else:
                    self._extend(row.handle, prompt, row.computed)
                    row.pad = prompt.pad
                row.total = row.known = row.real = len(prompt.ids)
            if columns and any(row.computed != row.at(columns) for row in self.rows):
                # What was admitted first has evicted what was found for the others.
                self.clear()
                self.begin(prompts, reuse=False)
                return
            self._prompts = list(prompts)
            self._align(reuse)
            if columns:
                self._take_states()
            if self.columns and self.states.has_positions and positions is not None:
                self.states.place(positions[:, :, : self.columns])
            self._skipped = self.columns
        except BaseException:
            self.clear()
            raise

    def _align(self, reuse: bool) -> None:
        """Start from the column to which all rows are computed, with what windows reach before it."""
        while True:
            found = min(row.pad + row.computed for row in self.rows) if reuse else 0
            self.columns = self._before_images(found, self._prompts)
            lacking = [n for n, row in enumerate(self.rows) if self._first_held(row) > row.at(self.columns)]
            if not lacking:
                return
            for number in lacking:
                row, prompt = self.rows[number], self._prompts[number]
                length = row.at(self.columns)
                self.blocks.manager.free([row.handle])
                row.handle, row.computed = self.blocks.manager.admit(
                    prompt.ids[: length + 1],
                    salt=prompt.salt,
                    extra=[pair for pair in prompt.extra if pair[0] <= length],
                )
                self._extend(row.handle, prompt, length + 1)

    def _extend(self, handle: int, prompt: Prompt, start: int) -> None:
        """Add a prompt's tokens from `start` on, and what they stand for beyond their ids."""
        extra = [(position - start, value) for position, value in prompt.extra if position >= start]
        self.blocks.manager.extend([handle], prompt.ids[start:], [len(prompt.ids) - start], extra=[extra])

    def _before_images(self, columns: int, prompts: Sequence[Prompt]) -> int:
        """The most columns, `columns` at most, that end inside of no row's image."""
        while True:
            inside = [
                prompt.pad + first
                for prompt in prompts
                for first, end in prompt.whole
                if prompt.pad + first < columns < prompt.pad + end
            ]
            if not inside:
                return columns
            columns = min(inside)

    def _first_held(self, row: Row) -> int:
        """The first token from which on each group has what windows reach."""
        first = 0
        for reach, blocks in zip(self.blocks.manager.groups, self._blocks(row), strict=True):
            gone = int((blocks < 0).sum())  # they come first
            if reach is not None and gone:
                first = max(first, gone * self.blocks.manager.block_size + reach.size - 1)
        return first

    def _continued_whole(self, prompts: Sequence[Prompt]) -> list[Row | None]:
        """The rows, where each prompt goes on from all that its row has computed: else states are of other tokens."""
        columns = self.columns
        new: list[Row | None] = [None] * len(prompts)
        told = len(self.rows) == len(self._prompts) == len(prompts) and self.factor == 1
        if not told or not columns or not self.goes_on or self._before_images(columns, prompts) < columns:
            return new
        for row, old, prompt in zip(self.rows, self._prompts, prompts, strict=True):
            count = row.computed
            if not 0 < count <= min(row.real, len(prompt.ids) - _AFTER_STATES) or prompt.pad + count != columns:
                return new
            marks = [[mark for mark in extra if mark[0] < count] for extra in (old.extra, prompt.extra)]
            if old.salt != prompt.salt or marks[0] != marks[1]:
                return new
            if (self.blocks.manager.tokens(row.handle)[:count] != prompt.ids[:count]).any():
                return new
        for row in self.rows:
            self.blocks.manager.trim(row.handle, row.computed)
        return [replace(row, total=row.computed) for row in self.rows]

    def _columns_with_states(self, prompts: Sequence[Prompt]) -> int:
        """The most columns after which the states of every row are there: each has a checkpoint where these end.

        As each counts the tokens of its own, the paddings differ by whole distances between checkpoints then.
        """
        if self.blocks.slots is None or not self.goes_on:
            return 0
        self.blocks.fetch(prompts)
        columns = prompts[0].pad + len(prompts[0].ids) - _AFTER_STATES
        padded, match = max(prompt.pad for prompt in prompts), self.blocks.manager.match
        while (columns := self._before_images(columns, prompts)) > padded:
            least = min(
                prompt.pad + match(prompt.ids, salt=prompt.salt, extra=prompt.extra, max_hit=columns - prompt.pad)
                for prompt in prompts
            )
            if least == columns:
                return columns
            columns = least
        return 0

    def _take_states(self) -> None:
        """The states of the checkpoints that all rows stand on."""
        manager, engine = self.blocks.manager, self.blocks.allocated()
        handles = [row.handle for row in self.rows]
        if manager.host_states:
            self.blocks.bring(engine.device)  # a state may be on its way from there, though K and V are not
        slots = torch.tensor([manager.state_slot(handle) for handle in handles], device=engine.device)
        assert self.blocks.slots is not None
        self.states.hold(self.blocks.slots.read(slots), self.states.held()[1])

    def _continued(self, number: int, prompt: Prompt) -> Row | None:
        """The row of that number, cut to what it has of a prompt; None where the prefix cache has more of it."""
        if number >= min(len(self.rows), len(self._prompts)):
            return None
        row, old = self.rows[number], self._prompts[number]
        if old.salt != prompt.salt:
            return None
        differing = [position for position, _ in {*old.extra} ^ {*prompt.extra}]
        most = min(row.real, row.computed, len(prompt.ids) - 1, *differing)
        same = self.blocks.manager.tokens(row.handle)[:most] == prompt.ids[:most]
        alike = most if same.all() else int(same.argmin())
        if alike < max(1, self._first_held(row)) or alike <= self.blocks.manager.match(
            prompt.ids, salt=prompt.salt, extra=prompt.extra
        ):
            return None
        self.blocks.manager.trim(row.handle, alike)
        return Row(row.handle, prompt.pad, alike, alike, alike, alike)

    def tell(self, rows: Sequence[Ids]) -> None:
        """The ids of all that the rows hold, without padding; longer ones are cut.

        Raises:
            ValueError: another number of rows, too few ids, others than were told before, or rows that never had any.
        """
        if len(rows) != len(self.rows) or self.factor > 1:
            raise ValueError(f"ids of {len(rows)} rows were given, the cache holds {len(self.rows) * self.factor}")
        if not self._prompts:
            raise ValueError("no prompt was told, so these ids belong to nothing; call begin before generation")
        manager = self.blocks.manager
        for number, (row, ids) in enumerate(zip(self.rows, rows, strict=True)):
            if row.known > row.real:
                raise ValueError(
                    f"row {number} was shared between beams after token {row.real}, so whose ids it holds is not known"
                )
            if len(ids) < row.total:
                raise ValueError(f"row {number} holds {row.total} tokens, and {len(ids)} ids were given")
            told = manager.tokens(row.handle)[: row.real]
            if (told != ids[: row.real]).any():
                differs = int((told != ids[: row.real]).argmax())
                raise ValueError(
                    f"row {number} holds token {told[differs]} at {differs}, and {ids[differs]} was given; they must "
                    "be the prompt's, and what came after it"
                )
        counts = [row.total - row.known for row in self.rows]
        new = [ids[row.known : row.total] for row, ids in zip(self.rows, rows, strict=True)]
        manager.set_tokens([row.handle for row in self.rows], np.concatenate(new), counts)
        for row in self.rows:
            row.known = row.real = row.total

    # Between passes

    def crop(self, columns: int) -> None:
        """Drop columns from the end until `columns` are left.

        Raises:
            ValueError: windows or states have moved on past what would be left; nothing was changed.
        """
        first = max((row.pad + self._first_held(row) for row in self.rows if self._first_held(row)), default=0)
        if 0 < columns < min(first, self._recorded[0].before if self._recorded else first):
            raise ValueError(
                f"{columns} columns would be left, but windows have moved on: at least {first} must be. To cut more, "
                "call activate_past_recording() before the pass that is to be cut"
            )
        self.states.crop(self.columns, self.columns - columns)
        if not columns and self.states:
            self.clear()
        self.settle(columns)
        for row in self.rows:
            length = row.at(columns)
            if row.total > length:
                self.blocks.manager.trim(row.handle, length)
                row.total = length
                row.computed, row.known, row.real = (min(n, length) for n in (row.computed, row.known, row.real))
        self.columns = columns
        self._skipped = 0

    def select(self, indices: Sequence[int]) -> None:
        """Row i becomes what row `indices[i]` is; rows that come twice share every block."""
        self.settle()
        forks = self._forks(indices)
        taken: set[int] = set()
        rows = []
        for index in indices:
            row = self.rows[index]
            rows.append(replace(row, handle=forks[index].pop()) if index in taken else row)
            taken.add(index)
        gone = [row.handle for index, row in enumerate(self.rows) if index not in taken]
        self._prompts = [self._prompts[index] for index in indices] if self._prompts else []
        self.rows, self.factor = rows, 1
        self.blocks.manager.free(gone)

    def fork(self) -> "Rows":
        """The same rows again, sharing every block."""
        self.settle()
        made = Rows(self.blocks)
        made.recording = self.recording
        forks = self._forks([*range(len(self.rows))] * 2)
        made.rows = [replace(row, handle=forks[index].pop()) for index, row in enumerate(self.rows)]
        made.columns, made.factor, made._prompts = self.columns, self.factor, list(self._prompts)
        made._resets = self._resets
        return made

    def _forks(self, indices: Sequence[int]) -> dict[int, list[int]]:
        """Handles for all but the first use of each row; all of them or none."""
        forks: dict[int, list[int]] = {}
        try:
            for index in sorted(set(indices)):
                more = indices.count(index) - 1
                row = self.rows[index]
                if more and row.known < row.computed:
                    count = row.total - row.known
                    self.blocks.manager.set_tokens([row.handle], self.blocks.unknown_ids(count), [count])
                    row.known = row.total
                forks[index] = self.blocks.manager.fork(row.handle, more) if more else []
        except BaseException:
            self.blocks.manager.free([handle for handles in forks.values() for handle in handles])
            raise
        return forks

    def clear(self) -> None:
        """Hold nothing."""
        self.abort()
        self.settle()
        self.states.clear()
        rows, self.rows, self._prompts, self.columns, self.factor = self.rows, [], [], 0, 1
        if rows:
            self.blocks.manager.free([row.handle for row in rows])
