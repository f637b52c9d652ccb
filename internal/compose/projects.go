package compose

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/volume"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/format"
	"github.com/cloudos-io/cloudos/internal/compose/engine"
	"github.com/cloudos-io/cloudos/internal/compose/model"
)

// projectRow is a project that has containers.
type projectRow struct{ Name, Status, ConfigFiles string }

func (a *app) cmdLs() *command.Command {
	var quiet, all, jsonOut bool
	tmpl := "table"
	var filters []string
	return &command.Command{Name: "ls", Short: "List projects",
		Flags: func(f *command.FlagSet) {
			f.String(&tmpl, "format", "", "table or json")
			f.Bool(&jsonOut, "json", "", "Same as --format json")
			f.Bool(&quiet, "quiet", "q", "Show names only")
			f.Bool(&all, "all", "a", "Show stopped projects too")
			f.Strings(&filters, "filter", "", "Show what passes: name=NAME")
		},
		Run: func(ctx context.Context, args []string) error {
			if jsonOut {
				tmpl = "json"
			}
			var names []string
			for _, s := range filters {
				k, v, ok := strings.Cut(s, "=")
				if !ok || k != "name" {
					return fmt.Errorf("invalid filter %q: only name=NAME is known", s)
				}
				names = append(names, v)
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			list, err := e.Client.ContainerList(ctx, client.ContainerListOptions{All: all, Filters: client.Filters{"label": {model.LabelProject, model.LabelHash}}})
			if err != nil {
				return err
			}
			rows := projects(list)
			rows = slices.DeleteFunc(rows, func(r projectRow) bool {
				return len(names) > 0 && !slices.ContainsFunc(names, func(n string) bool { return strings.Contains(r.Name, n) })
			})
			switch {
			case quiet:
				for _, r := range rows {
					fmt.Fprintln(a.out, r.Name)
				}
				return nil
			case tmpl == "json":
				return printJSON(a, rows)
			case tmpl != "table":
				return fmt.Errorf("unsupported format %q: use table or json", tmpl)
			}
			lines := [][]string{{"NAME", "STATUS", "CONFIG FILES"}}
			for _, r := range rows {
				lines = append(lines, []string{r.Name, r.Status, r.ConfigFiles})
			}
			return format.Align(a.out, lines)
		}}
}

// projects groups containers.
func projects(list []container.Summary) []projectRow {
	type group struct {
		states map[string]int
		files  []string
	}
	groups := map[string]*group{}
	for i := range list {
		c := &list[i]
		g := groups[c.Labels[model.LabelProject]]
		if g == nil {
			g = &group{states: map[string]int{}}
			groups[c.Labels[model.LabelProject]] = g
		}
		g.states[string(c.State)]++
		for _, f := range strings.Split(c.Labels[model.LabelConfigFiles], ",") {
			if f != "" && !slices.Contains(g.files, f) {
				g.files = append(g.files, f)
			}
		}
	}
	out := []projectRow{}
	for _, name := range slices.Sorted(maps.Keys(groups)) {
		g := groups[name]
		var states []string
		for _, s := range slices.Sorted(maps.Keys(g.states)) {
			states = append(states, fmt.Sprintf("%s(%d)", s, g.states[s]))
		}
		files := strings.Join(g.files, ",")
		if files == "" {
			files = "N/A"
		}
		out = append(out, projectRow{name, strings.Join(states, ", "), files})
	}
	return out
}

func (a *app) cmdVolumes() *command.Command {
	quiet, jsonOut, tmpl := false, false, ""
	return &command.Command{Name: "volumes", Args: "[SERVICE...]", Short: "List the project's volumes", Max: -1, Complete: []string{"service"},
		Flags: func(f *command.FlagSet) {
			f.Bool(&quiet, "quiet", "q", "Show names only")
			f.String(&tmpl, "format", "", "table, json or a template")
			f.Bool(&jsonOut, "json", "", "Same as --format json")
		},
		Run: func(ctx context.Context, args []string) error {
			if jsonOut {
				tmpl = "json"
			}
			p, err := a.named(ctx, args...)
			if err != nil {
				return err
			}
			for _, s := range args {
				if _, ok := p.Services[s]; !ok {
					return fmt.Errorf("no such service: %s", s)
				}
			}
			resp, err := a.eng.Client.VolumeList(ctx, client.Filters{"label": {model.LabelProject + "=" + p.Name}})
			if err != nil {
				return err
			}
			rows := resp.Volumes
			if len(args) > 0 {
				list, err := a.eng.Containers(ctx, p.Name, true, engine.WithOneOff, args...)
				if err != nil {
					return err
				}
				used := map[string]bool{}
				for i := range list {
					for _, m := range list[i].Mounts {
						used[m.Name] = true
					}
				}
				rows = slices.DeleteFunc(rows, func(v volume.Volume) bool { return !used[v.Name] })
			}
			type V = volume.Volume
			l := &format.List[V]{Quiet: "Name", Table: []string{"Driver", "Name"}, Labels: func(v V) map[string]string { return v.Labels }, Columns: []format.Column[V]{
				{Name: "Name", Heading: "VOLUME NAME", Text: func(v V) string { return v.Name }},
				{Name: "Driver", Heading: "DRIVER", Text: func(v V) string { return v.Driver }},
				{Name: "Scope", Heading: "SCOPE", Text: func(v V) string { return v.Scope }},
				{Name: "Mountpoint", Heading: "MOUNTPOINT", Text: func(v V) string { return v.Mountpoint }},
				{Name: "Labels", Heading: "LABELS", Text: func(v V) string { return labelText(v.Labels) }},
			}}
			return l.Print(a.out, rows, format.Options{Template: tmpl, Quiet: quiet})
		}}
}
