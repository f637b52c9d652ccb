package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/format"
	"github.com/cloudos-io/cloudos/internal/cli/terminal"
)

// pruneFlags are the options of every prune.
type pruneFlags struct {
	force   bool
	filters []string
	json    bool
}

func (o *pruneFlags) declare(f *command.FlagSet) {
	f.Bool(&o.force, "force", "f", "Do not ask")
	f.Strings(&o.filters, "filter", "", "Remove only what matches, key=value").Kind("filter")
	f.Bool(&o.json, "json", "", "Print the report as JSON")
}

var errNotConfirmed = errors.New("nothing was done")

// confirm asks before a removal; without a terminal it takes --force to go on.
func (a *App) confirm(o *pruneFlags, does string) error {
	if o.force {
		return nil
	}
	if !terminal.Is(a.Stdin) {
		return fmt.Errorf("%w: this %s; say --force to do it without being asked", errNotConfirmed, does)
	}
	ok, err := a.yesNo("This " + does + ". Go on?")
	if err != nil {
		return err
	}
	if !ok {
		return exitWith(exitFailure, errNotConfirmed)
	}
	return nil
}

// removed prints what a prune removed.
func (a *App) removed(title string, names []string) {
	if len(names) == 0 {
		return
	}
	fmt.Fprintf(a.out, "Deleted %s:\n", title)
	for _, n := range names {
		fmt.Fprintln(a.out, n)
	}
	fmt.Fprintln(a.out)
}

func (a *App) reclaimed(n uint64) {
	fmt.Fprintln(a.out, "Total reclaimed space:", format.Size(int64(n)))
}

// pruneCommand is the frame of a prune: ask, do, report.
func (a *App) pruneCommand(short string, what func() string, more func(*command.FlagSet), do func(ctx context.Context, c *client.Client, f client.Filters, o *pruneFlags) error) *command.Command {
	var o pruneFlags
	return &command.Command{Name: "prune", Short: short,
		Flags: func(f *command.FlagSet) {
			o.declare(f)
			if more != nil {
				more(f)
			}
		},
		Run: func(ctx context.Context, args []string) error {
			filters, err := readFilters(o.filters)
			if err != nil {
				return err
			}
			if err := a.confirm(&o, "removes "+what()); err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			return do(ctx, c, filters, &o)
		}}
}

func (a *App) cmdContainerPrune() *command.Command {
	return a.pruneCommand("Remove stopped containers", func() string { return "all stopped containers" }, nil,
		func(ctx context.Context, c *client.Client, f client.Filters, o *pruneFlags) error {
			r, err := c.ContainerPrune(ctx, f)
			if err != nil {
				return err
			}
			if o.json {
				return format.JSONLines(a.out, []any{r})
			}
			a.removed("containers", r.ContainersDeleted)
			a.reclaimed(r.SpaceReclaimed)
			return nil
		})
}

func (a *App) cmdImagePrune() *command.Command {
	all := false
	return a.pruneCommand("Remove images that nothing uses", func() string {
		if all {
			return "all images that no container uses"
		}
		return "all images without a name that no container uses"
	}, func(f *command.FlagSet) {
		f.Bool(&all, "all", "a", "Remove images with a name too")
	}, func(ctx context.Context, c *client.Client, f client.Filters, o *pruneFlags) error {
		f.Add("dangling", fmt.Sprint(!all))
		r, err := c.ImagePrune(ctx, f)
		if err != nil {
			return err
		}
		if o.json {
			return format.JSONLines(a.out, []any{r})
		}
		if len(r.ImagesDeleted) > 0 {
			fmt.Fprintln(a.out, "Deleted images:")
			for _, d := range r.ImagesDeleted {
				if d.Untagged != "" {
					fmt.Fprintln(a.out, "untagged:", d.Untagged)
				} else {
					fmt.Fprintln(a.out, "deleted:", d.Deleted)
				}
			}
			fmt.Fprintln(a.out)
		}
		a.reclaimed(r.SpaceReclaimed)
		return nil
	})
}

func (a *App) cmdVolumePrune() *command.Command {
	all := false
	return a.pruneCommand("Remove volumes that no container uses", func() string {
		if all {
			return "all volumes that no container uses, with all that is in them"
		}
		return "all anonymous volumes that no container uses, with all that is in them"
	}, func(f *command.FlagSet) {
		f.Bool(&all, "all", "a", "Remove volumes with a name too")
	}, func(ctx context.Context, c *client.Client, f client.Filters, o *pruneFlags) error {
		if all {
			f.Add("all", "true")
		}
		r, err := c.VolumePrune(ctx, f)
		if err != nil {
			return err
		}
		if o.json {
			return format.JSONLines(a.out, []any{r})
		}
		a.removed("volumes", r.VolumesDeleted)
		a.reclaimed(r.SpaceReclaimed)
		return nil
	})
}

func (a *App) cmdNetworkPrune() *command.Command {
	return a.pruneCommand("Remove networks that no container uses", func() string { return "all user-defined networks that no container uses" }, nil,
		func(ctx context.Context, c *client.Client, f client.Filters, o *pruneFlags) error {
			r, err := c.NetworkPrune(ctx, f)
			if err != nil {
				return err
			}
			if o.json {
				return format.JSONLines(a.out, []any{r})
			}
			a.removed("networks", r.NetworksDeleted)
			return nil
		})
}

func (a *App) cmdSystemPrune() *command.Command {
	all, volumes := false, false
	return a.pruneCommand("Remove everything that nothing uses", func() string {
		list := []string{"all stopped containers", "all networks that no container uses", "all images without a name"}
		if all {
			list[2] = "all images that no container uses"
		}
		if volumes {
			list = append(list, "all anonymous volumes that no container uses")
		}
		return strings.Join(append(list, "unused build cache"), ", ")
	}, func(f *command.FlagSet) {
		f.Bool(&all, "all", "a", "Remove images with a name too")
		f.Bool(&volumes, "volumes", "", "Remove anonymous volumes too")
	}, func(ctx context.Context, c *client.Client, f client.Filters, o *pruneFlags) error {
		req := api.PruneRequest{All: all, Volumes: volumes, Filters: map[string]map[string]bool{}}
		for k, vs := range f {
			req.Filters[k] = map[string]bool{}
			for _, v := range vs {
				req.Filters[k][v] = true
			}
		}
		r, err := c.Prune(ctx, req)
		if err != nil {
			return err
		}
		if o.json {
			return format.JSONLines(a.out, []any{r})
		}
		a.removed("containers", r.Containers)
		a.removed("networks", r.Networks)
		a.removed("volumes", r.Volumes)
		a.removed("images", r.Images)
		a.removed("build cache", r.BuildCache)
		a.reclaimed(r.SpaceReclaimed)
		return nil
	})
}
