package engine

import (
	"context"
	"fmt"
	"slices"
	"strconv"

	"github.com/moby/buildkit/client"
)

// DiskUsage tells what the cache takes, and which of it images share.
func (w *Worker) DiskUsage(ctx context.Context, opt client.DiskUsageInfo) ([]*client.UsageInfo, error) {
	list, err := w.Worker.DiskUsage(ctx, opt)
	if err != nil {
		return nil, err
	}
	return list, w.markShared(ctx, list)
}

// markShared marks the records whose layers images have: they take no room of
// their own.
func (w *Worker) markShared(ctx context.Context, list []*client.UsageInfo) error {
	chains, err := w.engine.Chains(ctx)
	if err != nil {
		return fmt.Errorf("cannot find out which layers images have: %w", err)
	}
	held := make(map[string]struct{}, len(chains))
	for _, c := range chains {
		held[c] = struct{}{}
	}
	for _, u := range list {
		si, ok := w.md.Get(u.ID)
		if !ok {
			continue
		}
		var chain, blob string
		if v := si.Get("cache.chainID"); v != nil {
			_ = v.Unmarshal(&chain)
		}
		if v := si.Get("cache.blob"); v != nil {
			_ = v.Unmarshal(&blob)
		}
		_, u.Shared = held[chain]
		u.Shared = u.Shared && blob != ""
	}
	return nil
}

// Prune drops records. Unless everything is to go, those that images share stay,
// and do not count: dropping them gives back nothing.
func (w *Worker) Prune(ctx context.Context, ch chan client.UsageInfo, opts ...client.PruneInfo) error {
	list, err := w.DiskUsage(ctx, client.DiskUsageInfo{})
	if err != nil {
		return err
	}
	var keep string
	var size int64
	for _, u := range list {
		if u.Shared {
			keep += ",id!=" + strconv.Quote(u.ID)
			size += u.Size
		}
	}
	opts = slices.Clone(opts)
	for i := range opts {
		o := &opts[i]
		bounded := o.MaxUsedSpace != 0 || o.ReservedSpace != 0 || o.MinFreeSpace != 0
		if o.All && !bounded || keep == "" {
			continue
		}
		if o.MaxUsedSpace != 0 {
			o.MaxUsedSpace += size
		}
		if o.ReservedSpace != 0 {
			o.ReservedSpace += size
		}
		filters := o.Filter
		if len(filters) == 0 {
			filters = []string{""}
		}
		o.Filter = nil
		for _, f := range filters {
			if f == "" {
				f = keep[1:]
			} else {
				f += keep
			}
			o.Filter = append(o.Filter, f)
		}
	}
	return w.Worker.Prune(ctx, ch, opts...)
}
