package client

import (
	"context"
	"strconv"

	"github.com/moby/moby/api/types/build"
)

// BuildPruneOptions tell what of the build cache goes.
type BuildPruneOptions struct {
	// All drops what images share and what frontends keep, too.
	All bool
	// Keep, MaxUsed and MinFree are bytes: of cache that stays in any case, that
	// may stay, and of the disk that are to be free. 0 says nothing.
	Keep, MaxUsed, MinFree int64
	Filters                Filters
}

// BuildPrune drops build cache.
func (c *Client) BuildPrune(ctx context.Context, o BuildPruneOptions) (build.CachePruneReport, error) {
	q := values("all", flag(o.All), "filters", o.Filters.encode())
	for key, n := range map[string]int64{"reserved-space": o.Keep, "max-used-space": o.MaxUsed, "min-free-space": o.MinFree} {
		if n != 0 {
			q.Set(key, strconv.FormatInt(n, 10))
		}
	}
	var out build.CachePruneReport
	err := c.post(ctx, "/build/prune", q, nil, &out)
	return out, err
}
