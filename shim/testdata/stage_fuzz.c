/* Feeds mutated plans to the parser and to every operation, with a kernel that
   answers at random: stage_fuzz ROUNDS SEED PLAN… */
#include "../stage_int.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void fake_seed(uint32_t v);

static uint32_t x;
static uint32_t rnd(uint32_t n)
{
	x ^= x << 13, x ^= x >> 17, x ^= x << 5;
	return n ? x % n : 0;
}

static uint32_t get32(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return v; }

/* Finds the start of a random operation, so that one can be dropped, doubled or
   aimed at. */
static uint32_t op_at(const uint8_t *p, uint32_t len, uint32_t *end)
{
	uint32_t at = 12, want = rnd(60);
	while (at + 8 <= len) {
		uint32_t n = get32(p + at + 4);
		if (n > len - at - 8)
			break;
		*end = at + 8 + n;
		if (!want--)
			return at;
		at = *end;
	}
	*end = len;
	return len > 12 ? 12 : 0;
}

static uint32_t mutate(uint8_t *p, uint32_t len, uint32_t cap)
{
	static const uint32_t odd[] = { 0, 1, 2, 7, 0x7f, 0x80, 0xff, 0x100, 0xfff, 0x7fff, 0xffff, 0x10000, 0x7fffffff, 0x80000000, 0xffffffff };
	for (uint32_t n = rnd(6) + 1; n && len; n--) {
		uint32_t end, at = op_at(p, len, &end), size = end - at;
		switch (rnd(8)) {
		case 0: p[rnd(len)] ^= (uint8_t)(1u << rnd(8)); break;
		case 1: p[rnd(len)] = (uint8_t)rnd(256); break;
		case 2: case 3:
			if (size > 4) {
				uint32_t v = odd[rnd(sizeof odd / sizeof *odd)];
				memcpy(p + at + rnd(size - 3), &v, 1u << rnd(3));
			}
			break;
		case 4: /* drop an operation */
			memmove(p + at, p + end, len - end);
			len -= size;
			break;
		case 5: /* another kind on the same payload */
			if (size >= 2)
				p[at] = (uint8_t)rnd(48);
			break;
		case 6: /* double one */
			if (len + size <= cap) {
				memmove(p + end, p + at, len - at);
				len += size;
			}
			break;
		case 7: len = rnd(len + 1); break;
		}
	}
	return len;
}

int main(int argc, char **argv)
{
	unsigned long rounds = argc > 3 ? strtoul(argv[1], NULL, 10) : 0, done = 0, through = 0;
	x = argc > 3 ? (uint32_t)strtoul(argv[2], NULL, 10) | 1 : 1;
	for (unsigned long i = 0; i < rounds; i++) {
		FILE *f = fopen(argv[3 + rnd((uint32_t)argc - 3)], "rb");
		static uint8_t raw[1 << 18];
		if (!f)
			return 2;
		uint32_t len = (uint32_t)fread(raw, 1, sizeof raw / 2, f);
		fclose(f);
		for (int k = 0; k < 64; k++, done++) {
			static uint8_t work[1 << 18];
			memcpy(work, raw, len);
			uint32_t n = k ? mutate(work, len, sizeof work) : len;
			/* memory of exactly that size, so that reading past it shows */
			uint8_t *plan = malloc(n ? n : 1);
			memcpy(plan, work, n);
			static struct stage s;
			memset(&s, 0, sizeof s);
			s.root = s.proc = s.null = s.mask = s.parent = -1;
			s.nslots = rnd(20);
			fake_seed(rnd(~0u));
			through += run_plan(&s, plan, n) == 0;
			free(plan);
		}
	}
	printf("%lu plans, %lu carried out\n", done, through);
	return 0;
}
