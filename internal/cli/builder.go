package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/build"
	"github.com/moby/moby/api/types/system"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/format"
)

// cmdBuild is a program of its own: a session with the builder speaks gRPC, which
// this program does not link.
func (a *App) cmdBuild() *command.Command {
	c := a.bundled("build", "Build an image from a Dockerfile", groupCommon)
	c.Args = "PATH|URL|-"
	return c
}

func (a *App) builder() []*command.Command {
	return []*command.Command{a.cmdBuild(), a.cmdBuilderUsage(), a.cmdBuilderPrune()}
}

func (a *App) cmdBuilderUsage() *command.Command {
	var o listFlags
	return &command.Command{Name: "du", Aliases: []string{"ls"}, Short: "Show the build cache",
		Flags: func(f *command.FlagSet) { o.declareFormat(f) },
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			du, _, err := c.DiskUsage(ctx, []system.DiskUsageObject{system.BuildCacheObject}, true)
			if err != nil {
				return err
			}
			u := du.BuildCacheUsage
			if u == nil {
				u = &build.DiskUsage{}
			}
			if o.json {
				return format.Object(a.out, *u, nil, "json")
			}
			if err := cacheColumns(time.Now()).Print(a.out, u.Items, o.options()); err != nil || o.format != "" {
				return err
			}
			fmt.Fprintf(a.out, "\nTotal: %s, to be had back: %s\n", format.Size(u.TotalSize), format.Size(u.Reclaimable))
			return nil
		}}
}

func cacheColumns(now time.Time) *format.List[build.CacheRecord] {
	type R = build.CacheRecord
	return &format.List[R]{Quiet: "ID", Table: []string{"ID", "Type", "Size", "Shared", "InUse", "LastUsedSince", "Description"},
		Columns: []format.Column[R]{
			{Name: "ID", Heading: "ID", Text: func(r R) string { return r.ID }},
			{Name: "Type", Heading: "TYPE", Text: func(r R) string { return r.Type }},
			{Name: "Size", Heading: "SIZE", Text: func(r R) string { return format.Size(r.Size) }},
			{Name: "Shared", Heading: "SHARED", Text: func(r R) string { return fmt.Sprint(r.Shared) }},
			{Name: "InUse", Heading: "IN USE", Text: func(r R) string { return fmt.Sprint(r.InUse) }},
			{Name: "LastUsedSince", Heading: "LAST USED", Text: func(r R) string {
				if r.LastUsedAt == nil {
					return ""
				}
				return units.HumanDuration(now.Sub(*r.LastUsedAt)) + " ago"
			}},
			{Name: "Description", Heading: "DESCRIPTION", Text: func(r R) string {
				if d := []rune(strings.Join(strings.Fields(r.Description), " ")); len(d) > 60 {
					return string(d[:59]) + "…"
				}
				return strings.Join(strings.Fields(r.Description), " ")
			}},
		}}
}

func (a *App) cmdBuilderPrune() *command.Command {
	all := false
	var keep, max, free string
	return a.pruneCommand("Remove build cache", func() string {
		if all {
			return "all build cache that no build is using"
		}
		return "build cache that no image shares"
	}, func(f *command.FlagSet) {
		f.Bool(&all, "all", "a", "Remove what images share, too")
		f.String(&keep, "keep-storage", "", "Keep this much, such as 10g")
		f.String(&max, "max-used-space", "", "Remove until no more than this is used")
		f.String(&free, "min-free-space", "", "Remove until this much of the disk is free")
	}, func(ctx context.Context, c *client.Client, f client.Filters, o *pruneFlags) error {
		opt := client.BuildPruneOptions{All: all, Filters: f}
		for _, x := range []struct {
			flag, v string
			to      *int64
		}{{"keep-storage", keep, &opt.Keep}, {"max-used-space", max, &opt.MaxUsed}, {"min-free-space", free, &opt.MinFree}} {
			if x.v == "" {
				continue
			}
			n, err := units.RAMInBytes(x.v)
			if err != nil {
				return fmt.Errorf("cannot use --%s %q: write it as 10g", x.flag, x.v)
			}
			*x.to = n
		}
		r, err := c.BuildPrune(ctx, opt)
		if err != nil {
			return err
		}
		if o.json {
			return format.JSONLines(a.out, []any{r})
		}
		a.removed("build cache", r.CachesDeleted)
		a.reclaimed(r.SpaceReclaimed)
		return nil
	})
}
