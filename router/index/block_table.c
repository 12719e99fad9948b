/* Which workers hold which blocks, as a table from a block's name to a set of slots; a slot stands for a worker.
 *
 * Most names have one of few different sets, so sets are interned: an entry is a name and the number of its set (a bit
 * mask of `words` 64-bit words, counted by reference), 16 bytes, and 24 to 48 bytes at loads of 2/3 to 1/3. Set 0 is
 * empty and marks a free entry. Open addressing, linear probing; erasing moves later entries back, so there are no
 * tombstones and in the steady state (as many stored as removed) nothing is ever rebuilt.
 *
 * Forgetting a worker retires its slot at once and sweeps its bit out later, SWEEP entries with each change. A sweep
 * goes downwards and around, from an entry that was free when it began. Erasing moves entries towards their home, never
 * past it, and no old entry behind that free one has its home before it: so none gets from the unswept part into the
 * swept. New entries never have a retired bit. A slot is used again only after a whole sweep.
 *
 * Every allocation happens in `rebuild`, which changes nothing where it fails. One thread at a time (the GIL's). */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { ABI = 2, NO_MEMORY = -1, BAD_ARGUMENT = -2 };
enum { MIN_CAPACITY = 1024, MIN_SETS = 64, SETS_SHARE = 16, MAX_SLOTS = 1 << 16, AHEAD = 16, SWEEP = 2048, MAX_RETIRED = 64 };
#define NONE UINT32_MAX
#define EXPORT __attribute__((visibility("default")))

typedef struct {
    uint64_t name;
    uint32_t set;
} entry;

typedef struct {
    entry *entries;
    size_t capacity, count;
    unsigned shift;
    size_t words;                      /* 64-bit words of a set */
    uint64_t *bits;                    /* set_capacity sets */
    uint32_t *refs, *next, *buckets;   /* chains of equal hash; `next` also chains the free sets */
    size_t set_capacity, num_sets, used_sets;
    uint32_t free_set;
    uint64_t *live, *retired, *sweeping, *scratch; /* sets of slots, one allocation */
    size_t num_slots, num_retired;
    size_t sweep_at, sweep_left;
} table;

static uint64_t load(const unsigned char *names, size_t i)
{
    uint64_t name;
    memcpy(&name, names + 8 * i, 8);
    return name;
}

/* --- entries ----------------------------------------------------------------------------------------------------- */

static size_t home(const table *t, uint64_t name) { return (size_t)((name * 0x9E3779B97F4A7C15u) >> t->shift); }

static void prefetch(const table *t, const unsigned char *names, size_t i, size_t count)
{
    for (size_t k = i ? i + AHEAD : 0; k <= i + AHEAD && k < count; k++)
        __builtin_prefetch(&t->entries[home(t, load(names, k))]);
}

/* Where the name is, or the free entry where it would be. */
static size_t find(const table *t, uint64_t name)
{
    size_t at = home(t, name);
    while (t->entries[at].set && t->entries[at].name != name)
        at = (at + 1) & (t->capacity - 1);
    return at;
}

/* --- sets -------------------------------------------------------------------------------------------------------- */

static int has(const table *t, uint32_t set, uint32_t slot)
{
    return t->bits[set * t->words + slot / 64] >> slot % 64 & 1;
}

static size_t bucket(const table *t, const uint64_t *bits)
{
    uint64_t hash = 0;
    for (size_t w = 0; w < t->words; w++) {
        hash = (hash ^ bits[w]) * 0xBF58476D1CE4E5B9u;
        hash ^= hash >> 32;
    }
    return (size_t)hash & (t->set_capacity - 1);
}

static int sets_full(const table *t) { return !t->free_set && t->used_sets == t->set_capacity; }

static void retain(table *t, uint32_t set)
{
    if (set)
        t->refs[set]++;
}

static void release(table *t, uint32_t set)
{
    if (!set || --t->refs[set])
        return;
    uint32_t *link = &t->buckets[bucket(t, t->bits + set * t->words)];
    while (*link != set)
        link = &t->next[*link];
    *link = t->next[set];
    t->next[set] = t->free_set;
    t->free_set = set;
    t->num_sets--;
}

/* The number of the set in `scratch`, not yet retained; there must be room for a new one. */
static uint32_t intern(table *t)
{
    size_t size = t->words * sizeof(uint64_t), in = bucket(t, t->scratch);
    uint32_t set = t->buckets[in];
    while (set && memcmp(t->bits + set * t->words, t->scratch, size))
        set = t->next[set];
    if (set)
        return set;
    set = t->free_set;
    if (set)
        t->free_set = t->next[set];
    else
        set = (uint32_t)t->used_sets++;
    memcpy(t->bits + set * t->words, t->scratch, size);
    t->refs[set] = 0;
    t->next[set] = t->buckets[in];
    t->buckets[in] = set;
    t->num_sets++;
    return set;
}

/* scratch = live slots of the set; whether there are any. */
static int take_live(table *t, uint32_t set)
{
    uint64_t any = 0;
    for (size_t w = 0; w < t->words; w++)
        any |= t->scratch[w] = t->bits[set * t->words + w] & t->live[w];
    return any != 0;
}

/* --- growing and shrinking --------------------------------------------------------------------------------------- */

static void discard(table *t)
{
    free(t->entries), free(t->bits), free(t->refs), free(t->next), free(t->buckets), free(t->live);
}

/* Anew, as large as the contents ask for; the numbers of sets change and a sweep begins anew. 0: no memory. */
static int rebuild(table *t, size_t words)
{
    table n = {.capacity = MIN_CAPACITY, .shift = 54, .set_capacity = MIN_SETS, .words = words, .used_sets = 1};
    for (; n.capacity / 2 <= t->count; n.capacity *= 2)
        n.shift--;
    while (n.set_capacity < n.capacity / SETS_SHARE || n.set_capacity / 2 <= t->num_sets + 1)
        n.set_capacity *= 2;
    if (n.capacity >= NONE || n.set_capacity >= NONE)
        return 0;
    n.entries = calloc(n.capacity, sizeof(entry));
    n.bits = calloc(n.set_capacity, words * sizeof(uint64_t));
    n.refs = calloc(n.set_capacity, sizeof(uint32_t));
    n.next = calloc(n.set_capacity, sizeof(uint32_t));
    n.buckets = calloc(n.set_capacity, sizeof(uint32_t));
    n.live = calloc(4 * words, sizeof(uint64_t));
    uint32_t *renumbered = calloc(t->used_sets + 1, sizeof(uint32_t));
    if (!n.entries || !n.bits || !n.refs || !n.next || !n.buckets || !n.live || !renumbered) {
        free(renumbered), discard(&n);
        return 0;
    }
    n.retired = n.live + words, n.sweeping = n.retired + words, n.scratch = n.sweeping + words;
    n.num_slots = t->num_slots, n.num_retired = t->num_retired;
    for (size_t w = 0; w < t->words; w++)
        n.live[w] = t->live[w], n.retired[w] = t->retired[w];
    for (uint32_t set = 1; set < t->used_sets; set++)
        if (t->refs[set]) {
            memcpy(n.scratch, t->bits + set * t->words, t->words * sizeof(uint64_t));
            renumbered[set] = intern(&n);
            n.refs[renumbered[set]] = t->refs[set];
        }
    for (size_t at = 0; at < t->capacity; at++)
        if (t->entries[at].set) {
            entry *to = &n.entries[find(&n, t->entries[at].name)];
            to->name = t->entries[at].name;
            to->set = renumbered[t->entries[at].set];
        }
    n.count = t->count;
    free(renumbered), discard(t);
    *t = n;
    return 1;
}

/* Give memory back. Pays for itself: the walk over all entries follows removals or lost sets in proportion. */
static void shrink(table *t)
{
    if ((t->capacity > MIN_CAPACITY && t->count < t->capacity / 8) ||
        (t->set_capacity > MIN_SETS && t->set_capacity > t->capacity / SETS_SHARE && t->num_sets < t->set_capacity / 8))
        rebuild(t, t->words); /* without memory for it, it stays as it is */
}

/* --- changes ----------------------------------------------------------------------------------------------------- */

static void erase(table *t, size_t hole)
{
    release(t, t->entries[hole].set);
    for (size_t at = hole;;) {
        at = (at + 1) & (t->capacity - 1);
        if (!t->entries[at].set)
            break;
        if (((at - home(t, t->entries[at].name)) & (t->capacity - 1)) >= ((at - hole) & (t->capacity - 1))) {
            t->entries[hole] = t->entries[at];
            hole = at;
        }
    }
    t->entries[hole].set = 0;
    t->count--;
}

static void begin_sweep(table *t)
{
    memcpy(t->sweeping, t->retired, t->words * sizeof(uint64_t));
    t->sweep_left = t->capacity;
    for (t->sweep_at = 0; t->entries[t->sweep_at].set;)
        t->sweep_at++;
}

static void end_sweep(table *t)
{
    t->num_retired = 0;
    for (size_t w = 0; w < t->words; w++) {
        t->retired[w] &= ~t->sweeping[w];
        t->num_retired += (size_t)__builtin_popcountll(t->retired[w]);
    }
}

/* Clear retired bits out of at most `limit` entries. Without memory it stops and goes on with the next change. */
static void sweep(table *t, size_t limit)
{
    for (; t->num_retired && limit; limit--) {
        if (!t->sweep_left)
            begin_sweep(t);
        if (sets_full(t) && !rebuild(t, t->words))
            return;
        if (!t->sweep_left)
            continue; /* rebuilt */
        t->sweep_at = (t->sweep_at - 1) & (t->capacity - 1);
        entry *e = &t->entries[t->sweep_at];
        if (e->set) {
            if (!take_live(t, e->set))
                erase(t, t->sweep_at);
            else if (memcmp(t->scratch, t->bits + e->set * t->words, t->words * sizeof(uint64_t))) {
                uint32_t set = intern(t);
                retain(t, set), release(t, e->set);
                e->set = set;
            }
        }
        if (!--t->sweep_left)
            end_sweep(t);
    }
    shrink(t);
}

/* Add or take away one slot for each name. `totals` of the slot go along: {number of names held, their XOR}. */
static int change(table *t, uint32_t slot, const unsigned char *names, size_t count, int stores, uint64_t *totals)
{
    uint32_t from = NONE, to = 0; /* the last change of sets; most are like the one before. Both retained. */
    int status = 0;
    for (size_t i = 0; i < count; i++) {
        prefetch(t, names, i, count);
        uint64_t name = load(names, i);
        size_t at = find(t, name);
        uint32_t set = t->entries[at].set;
        if (has(t, set, slot) == stores)
            continue;
        if ((!set && t->count * 3 >= t->capacity * 2) || (set != from && sets_full(t))) {
            if (from != NONE)
                release(t, from), release(t, to);
            from = NONE;
            if (!rebuild(t, t->words)) {
                status = NO_MEMORY;
                break;
            }
            at = find(t, name);
            set = t->entries[at].set;
        }
        if (set != from) {
            if (from != NONE)
                release(t, from), release(t, to);
            take_live(t, set);
            t->scratch[slot / 64] ^= (uint64_t)1 << slot % 64;
            from = set;
            to = 0;
            for (size_t w = 0; w < t->words && !to; w++)
                to = t->scratch[w] ? intern(t) : 0;
            retain(t, from), retain(t, to);
        }
        if (to) {
            retain(t, to), release(t, set);
            t->count += !set;
            t->entries[at].name = name;
            t->entries[at].set = to;
        } else
            erase(t, at);
        totals[0] += stores ? 1 : -(uint64_t)1;
        totals[1] ^= name;
    }
    if (from != NONE)
        release(t, from), release(t, to);
    if (t->num_retired)
        sweep(t, SWEEP);
    else if (!stores)
        shrink(t);
    return status;
}

static int is_live(const table *t, uint32_t slot)
{
    return slot < t->words * 64 && t->live[slot / 64] >> slot % 64 & 1;
}

/* --- for the outside --------------------------------------------------------------------------------------------- */

EXPORT int table_abi(void) { return ABI; }

EXPORT table *table_new(void)
{
    table *t = calloc(1, sizeof(table));
    if (t && !rebuild(t, 1)) {
        free(t);
        t = NULL;
    }
    return t;
}

EXPORT void table_free(table *t)
{
    if (t)
        discard(t);
    free(t);
}

/* A slot for a worker without blocks, the lowest there is. */
EXPORT int table_claim(table *t)
{
    for (;;) {
        for (size_t w = 0; w < t->words; w++) {
            uint64_t unused = ~(t->live[w] | t->retired[w]);
            if (unused) {
                size_t slot = w * 64 + (size_t)__builtin_ctzll(unused);
                t->live[w] |= unused & -unused;
                if (slot >= t->num_slots)
                    t->num_slots = slot + 1;
                return (int)slot;
            }
        }
        if (t->words * 64 >= MAX_SLOTS || !rebuild(t, t->words * 2))
            return NO_MEMORY;
    }
}

/* Forget a worker's blocks. */
EXPORT int table_retire(table *t, uint32_t slot)
{
    if (!is_live(t, slot))
        return BAD_ARGUMENT;
    t->live[slot / 64] &= ~((uint64_t)1 << slot % 64);
    t->retired[slot / 64] |= (uint64_t)1 << slot % 64;
    t->num_retired++;
    if (t->num_retired > MAX_RETIRED) /* sets stay short */
        sweep(t, SIZE_MAX);
    return 0;
}

EXPORT int table_store(table *t, uint32_t slot, const unsigned char *names, size_t count, uint64_t *totals)
{
    return is_live(t, slot) ? change(t, slot, names, count, 1, totals) : BAD_ARGUMENT;
}

EXPORT int table_remove(table *t, uint32_t slot, const unsigned char *names, size_t count, uint64_t *totals)
{
    return is_live(t, slot) ? change(t, slot, names, count, 0, totals) : BAD_ARGUMENT;
}

/* Slots that hold leading names without a hole, and how many; by number of names. `room`: length of the two arrays.
 * Returns how many slots. */
EXPORT int table_match(table *t, const unsigned char *names, size_t count, uint32_t *slots, uint32_t *depths, size_t room)
{
    size_t found = 0;
    uint32_t last = NONE;
    if (room < t->num_slots || count >= NONE)
        return BAD_ARGUMENT;
    memcpy(t->scratch, t->live, t->words * sizeof(uint64_t));
    for (size_t i = 0; i <= count; i++) {
        uint32_t set = 0; /* after the last name: all that are left drop out */
        if (i < count) {
            prefetch(t, names, i, count);
            set = t->entries[find(t, load(names, i))].set;
        }
        if (set == last)
            continue;
        uint64_t any = 0;
        for (size_t w = 0; w < t->words; w++) {
            uint64_t gone = t->scratch[w] & ~t->bits[set * t->words + w];
            any |= t->scratch[w] &= ~gone;
            for (; gone && i; gone &= gone - 1) {
                slots[found] = (uint32_t)(w * 64) + (uint32_t)__builtin_ctzll(gone);
                depths[found++] = (uint32_t)i;
            }
        }
        if (!any)
            break;
        last = set;
    }
    return (int)found;
}

/* Whether the slot holds this name, whatever comes before it. */
EXPORT int table_holds(const table *t, uint32_t slot, uint64_t name)
{
    return is_live(t, slot) && has(t, t->entries[find(t, name)].set, slot);
}

/* All names of one slot, in no order; returns how many, of which the first `room` are in `names`. */
EXPORT size_t table_held(const table *t, uint32_t slot, uint64_t *names, size_t room)
{
    size_t found = 0;
    for (size_t at = 0; at < t->capacity && is_live(t, slot); at++)
        if (has(t, t->entries[at].set, slot)) {
            if (found < room)
                names[found] = t->entries[at].name;
            found++;
        }
    return found;
}

/* Four numbers: names in the table, slots ever used at once, slots to be swept, bytes. */
EXPORT void table_stats(const table *t, uint64_t *stats)
{
    stats[0] = t->count;
    stats[1] = t->num_slots;
    stats[2] = t->num_retired;
    stats[3] = sizeof(table) + t->capacity * sizeof(entry) + t->set_capacity * (t->words * 8 + 12) + t->words * 32;
}
