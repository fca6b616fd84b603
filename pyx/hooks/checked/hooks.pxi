# Hooks for tests, a part of manager.pyx: they break the books, or show what no caller needs. Not in what ships.

from core.memory cimport SLOT_MASK, kvb_fail_after
from core.pool cimport Pool, pool_step
from core.sequences cimport Seq
from core.tree cimport Tree, line_of, node_at


def _fail_allocation(int64_t after):
    """Make the manager's allocation after `after` more fail; negative: none. Returns what was left."""
    return kvb_fail_after(after)


def _collide(BlockManager manager not None):
    """Make every hash of a manager, which must be new, equal."""
    # The hash of a node is a product with (its parent's hash ^ seed), and that is 0 from the root down.
    manager.core.pool.tree.seed = manager.core.pool.tree.seal = node_at(&manager.core.pool.tree, 0).hash = 0


def _longest_walk(BlockManager manager not None):
    """Lines of the prefix tree's table that the longest way to a node takes."""
    cdef const Tree* t = &manager.core.pool.tree
    cdef uint32_t i, start, longest = 0
    cdef int32_t slot
    with manager.lock:
        for i in range(t.num_lines):
            for slot in range(12):
                if t.lines[i].tags[slot]:
                    start = line_of(t, node_at(t, t.lines[i].nodes[slot]).hash)
                    longest = max(longest, (i - start if i >= start else t.num_lines - start + i) + 1)
    return longest


def _poke(BlockManager manager not None, str field, Py_ssize_t index, int64_t value):
    """Break the books: add `value` to one number in them."""
    cdef Pool* p = &manager.core.pool
    cdef Seq* seq = &manager.core.seqs[index & SLOT_MASK]
    with manager.lock:
        if field == "refs":
            p.blocks[index].refs += value
        elif field == "block_node":
            p.blocks[index].node += value
        elif field == "link":
            p.blocks[index].link += value
        elif field == "queue":
            p.queue[(p.queue_head + index) & p.queue_mask] += value
        elif field == "num_cached":
            p.num_cached += value
        elif field == "num_waiting":
            p.num_waiting += value
        elif field == "node_parent":
            node_at(&p.tree, index).parent += value
        elif field == "node_block":
            node_at(&p.tree, index).blocks[0] += value
        elif field == "node_token":
            p.tree.tokens[index * p.tree.block_size] += value
        elif field == "node_hash":
            node_at(&p.tree, index).hash += value
        elif field == "node_uses":
            node_at(&p.tree, index).uses += value
        elif field == "passed":
            p.tree.lines[index].passed += value
        elif field == "num_nodes":
            p.tree.num_nodes += value
        elif field == "table":
            seq.table[0] += value
        elif field == "num_rows":
            seq.num_rows += value
        elif field == "reserved":
            seq.reserved += value
        elif field == "num_computed":
            seq.num_computed += value
        elif field == "last_node":
            seq.last_node += value
        elif field == "slot_node":
            p.host.slots[index].node += value
        elif field == "slot_group":
            p.host.slots[index].group += value
        elif field == "slot_newer":
            p.host.slots[index].newer += value
        elif field == "slot_of":
            p.host.slot_of[p.host.slots[index].node * p.host.width + p.host.slots[index].group] += value
        elif field == "slot_move":
            p.host.slots[index].move += value
        elif field == "oldest":
            p.host.blocks.oldest += value
        elif field == "examined":
            p.host.examined += value
        elif field == "shadow_move":
            p.host.shadows[index].move += value
        elif field == "slot_holds":
            p.host.slots[index].holds += value
        elif field == "slot_known":
            p.host.slots[index].known += value
        elif field == "slot_passed":
            p.host.slots[index].passed += value
        elif field == "num_held":
            p.host.blocks.num_held += value
        elif field == "spill_size":
            p.host.blocks.spill_size += value
        elif field == "spills":
            p.host.blocks.spills[index] += value
        elif field == "place":
            p.host.places[index] += value
        elif field == "named":
            p.tree.named[index] += value
        elif field == "work_slot":
            p.host.works.slots[index] += value
        elif field == "moves_landed":
            p.moves.landed += value
        elif field == "state_refs":
            p.states.slots[index].refs += value
        elif field == "state_at":
            p.states.slots[index].at += value
        elif field == "state_node":
            p.states.slots[index].node += value
        elif field == "state_idle":
            p.states.num_idle += value
        elif field == "offered":
            p.states.slots[index].offered += value
        elif field == "offers":
            p.states.offers[index] += value
        elif field == "num_offers":
            p.states.num_offers += value
        elif field == "checkpoints_held":
            p.host.checkpoints.num_held += value
        elif field == "state_of":
            p.states.of_node[index] += value
        elif field == "standing":
            p.states.standing[index & SLOT_MASK].slot += value
        elif field == "lost":
            p.states.standing[index & SLOT_MASK].lost += value
        elif field == "row_start":
            pool_step(p, 0).rows[index].start += value
        elif field == "row_slot":
            pool_step(p, 0).rows[index].slot += value
        else:
            raise ValueError(f"no field {field!r}")
