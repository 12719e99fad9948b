/* Names of a prompt's full blocks, as blocks.py defines them; its numpy is the reference, and what serves uncompiled. */

#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

static uint64_t mix(uint64_t x)
{
    x ^= x >> 30;
    x *= UINT64_C(0xBF58476D1CE4E5B9);
    x ^= x >> 27;
    x *= UINT64_C(0x94D049BB133111EB);
    return x ^ (x >> 31);
}

/* _odd_multipliers(…, 2) at an index */
static uint64_t position(uint64_t index)
{
    return mix((index + 1 + (UINT64_C(2) << 32)) * UINT64_C(0x9E3779B97F4A7C15)) | 1;
}

EXPORT int names_abi(void)
{
    return 1;
}

/* count: of blocks, block_size tokens each.  coefficients: block_size of them.  acc, depth: of the name before. */
EXPORT void names_of(const uint32_t *tokens, size_t count, size_t block_size, const uint64_t *coefficients,
                     uint64_t acc, uint64_t depth, uint64_t *names)
{
    for (size_t i = 0; i < count; i++, tokens += block_size) {
        uint64_t sum = 0;
        for (size_t k = 0; k < block_size; k++)
            sum += ((uint64_t)tokens[k] + 1) * coefficients[k];
        acc += mix(sum) * position(depth + i);
        names[i] = mix(acc);
    }
}
