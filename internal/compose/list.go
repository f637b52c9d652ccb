package compose

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"golang.org/x/sync/errgroup"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/format"
	"github.com/cloudos-io/cloudos/internal/compose/engine"
	"github.com/cloudos-io/cloudos/internal/compose/model"
)

// psRow is a container as ps shows it; the JSON has Docker Compose's fields.
type psRow struct {
	container.Summary
	exitCode int
	health   string
}

func (a *app) cmdPs() *command.Command {
	var quiet, services, all, noTrunc, jsonOut bool
	orphans, tmpl, filter := true, "", ""
	var status []string
	return &command.Command{Name: "ps", Args: "[SERVICE...]", Short: "List containers", Max: -1, Complete: []string{"service"},
		Flags: func(f *command.FlagSet) {
			f.String(&tmpl, "format", "", "table, json or a template")
			f.Bool(&jsonOut, "json", "", "Print one object a line (same as --format json)")
			f.String(&filter, "filter", "", "Show what passes: status=STATUS")
			f.Strings(&status, "status", "", "Show containers in this state: created, running, paused, restarting, removing, exited, dead")
			f.Bool(&quiet, "quiet", "q", "Show ids only")
			f.Bool(&services, "services", "", "Show services only")
			f.Bool(&orphans, "orphans", "", "Show containers of services that the file does not have")
			f.Bool(&all, "all", "a", "Show stopped containers too")
			f.Bool(&noTrunc, "no-trunc", "", "Do not shorten")
		},
		Run: func(ctx context.Context, args []string) error {
			if filter != "" {
				k, v, ok := strings.Cut(filter, "=")
				if !ok || k != "status" && k != "source" {
					return fmt.Errorf("unknown filter %q: only status=STATUS is known", filter)
				}
				status = append(status, v)
			}
			if len(status) > 0 {
				all = true
			}
			if jsonOut {
				tmpl = "json"
			}
			p, err := a.named(ctx, args...)
			if err != nil {
				return err
			}
			one := engine.WithoutOneOff
			if all {
				one = engine.WithOneOff
			}
			list, err := a.eng.Containers(ctx, p.Name, all, one, args...)
			if err != nil {
				return err
			}
			list = slices.DeleteFunc(list, func(c container.Summary) bool {
				_, known := p.Services[model.Service(&c)]
				return !orphans && !known || len(status) > 0 && !slices.Contains(status, string(c.State))
			})
			if services {
				var names []string
				for i := range list {
					names = append(names, model.Service(&list[i]))
				}
				slices.Sort(names)
				for _, n := range slices.Compact(names) {
					fmt.Fprintln(a.out, n)
				}
				return nil
			}
			rows, err := a.psRows(ctx, list)
			if err != nil {
				return err
			}
			if quiet && tmpl == "" {
				for i := range rows {
					fmt.Fprintln(a.out, rows[i].ID)
				}
				return nil
			}
			return psColumns(noTrunc, time.Now()).Print(a.out, rows, format.Options{Template: tmpl})
		}}
}

// psRows adds what the list of containers lacks.
func (a *app) psRows(ctx context.Context, list []container.Summary) ([]psRow, error) {
	rows := make([]psRow, len(list))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(16)
	for i := range list {
		rows[i].Summary = list[i]
		if h := list[i].Health; h != nil && list[i].State == container.StateRunning && h.Status != container.NoHealthcheck {
			rows[i].health = string(h.Status)
		}
		if s := list[i].State; s != container.StateExited && s != container.StateDead {
			continue
		}
		g.Go(func() error {
			in, _, err := a.eng.Client.ContainerInspect(ctx, list[i].ID, false)
			if err == nil && in.State != nil {
				rows[i].exitCode = in.State.ExitCode
			}
			if client.IsNotFound(err) {
				return nil
			}
			return err
		})
	}
	return rows, g.Wait()
}

type publisher struct {
	URL           string
	TargetPort    int
	PublishedPort int
	Protocol      string
}

func psColumns(noTrunc bool, now time.Time) *psList {
	type R = psRow
	short := func(s string, n int) string {
		if noTrunc {
			return s
		}
		return format.Ellipsis(s, n)
	}
	l := &format.List[R]{Quiet: "ID", Labels: func(r R) map[string]string { return r.Labels },
		Table: []string{"Name", "Image", "Command", "Service", "RunningFor", "Status", "Ports"},
		Columns: []format.Column[R]{
			{Name: "ID", Heading: "CONTAINER ID", Text: func(r R) string {
				if noTrunc {
					return r.ID
				}
				return r.ID[:min(12, len(r.ID))]
			}},
			{Name: "Name", Heading: "NAME", Text: func(r R) string { return model.Name(&r.Summary) }},
			{Name: "Names", Heading: "NAMES", Text: func(r R) string { return model.Name(&r.Summary) }},
			{Name: "Project", Heading: "PROJECT", Text: func(r R) string { return r.Summary.Labels[model.LabelProject] }},
			{Name: "Service", Heading: "SERVICE", Text: func(r R) string { return model.Service(&r.Summary) }},
			{Name: "Image", Heading: "IMAGE", Text: func(r R) string { return r.Image }},
			{Name: "Command", Heading: "COMMAND", Text: func(r R) string { return strconv.Quote(short(r.Command, 20)) }},
			{Name: "CreatedAt", Heading: "CREATED AT", Text: func(r R) string { return time.Unix(r.Created, 0).String() }},
			{Name: "RunningFor", Heading: "CREATED", Text: func(r R) string { return format.Ago(time.Unix(r.Created, 0), now) }},
			{Name: "Ports", Heading: "PORTS", Text: func(r R) string { return portsText(r.Ports) }},
			{Name: "State", Heading: "STATE", Text: func(r R) string { return string(r.State) }},
			{Name: "Status", Heading: "STATUS", Text: func(r R) string { return r.Status }},
			{Name: "Health", Heading: "HEALTH", Text: func(r R) string { return r.health }},
			{Name: "ExitCode", Heading: "EXIT CODE", Text: func(r R) string { return strconv.Itoa(r.exitCode) }},
			{Name: "Size", Heading: "SIZE", Text: func(r R) string { return format.Size(r.SizeRw) }},
			{Name: "Labels", Heading: "LABELS", Text: func(r R) string { return labelText(r.Summary.Labels) }},
			{Name: "Mounts", Heading: "MOUNTS", Text: func(r R) string { return strings.Join(mountNames(&r.Summary), ",") }},
			{Name: "LocalVolumes", Heading: "LOCAL VOLUMES", Text: func(r R) string { return strconv.Itoa(localVolumes(&r.Summary)) }},
			{Name: "Networks", Heading: "NETWORKS", Text: func(r R) string {
				if r.NetworkSettings == nil {
					return ""
				}
				return strings.Join(slices.Sorted(maps.Keys(r.NetworkSettings.Networks)), ",")
			}},
		}}
	return &psList{l}
}

// psList prints as List does, but JSON with the types that Docker Compose has.
type psList struct{ *format.List[psRow] }

func (l *psList) Print(w interface{ Write([]byte) (int, error) }, rows []psRow, o format.Options) error {
	if o.Template != "json" {
		return l.List.Print(w, rows, o)
	}
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	for _, r := range rows {
		m := map[string]any{}
		for _, c := range l.Columns {
			m[c.Name] = c.Text(r)
		}
		m["ExitCode"] = r.exitCode
		pubs := []publisher{}
		for _, p := range r.Ports {
			url := ""
			if p.IP.IsValid() {
				url = p.IP.String()
			}
			pubs = append(pubs, publisher{url, int(p.PrivatePort), int(p.PublicPort), p.Type})
		}
		slices.SortFunc(pubs, func(a, b publisher) int {
			return cmp.Or(cmp.Compare(a.TargetPort, b.TargetPort), cmp.Compare(a.URL, b.URL))
		})
		m["Publishers"] = pubs
		if err := enc.Encode(m); err != nil {
			return err
		}
	}
	return nil
}

func mountNames(c *container.Summary) []string {
	var out []string
	for _, m := range c.Mounts {
		name := m.Name
		if name == "" {
			name = m.Source
		}
		out = append(out, name)
	}
	return out
}

func localVolumes(c *container.Summary) (n int) {
	for _, m := range c.Mounts {
		if m.Type == mount.TypeVolume && m.Driver == "local" {
			n++
		}
	}
	return n
}

func labelText(m map[string]string) string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, k+"="+m[k])
	}
	return strings.Join(out, ",")
}

func portsText(ports []container.PortSummary) string {
	ports = slices.Clone(ports)
	slices.SortFunc(ports, func(a, b container.PortSummary) int {
		return cmp.Or(cmp.Compare(a.PrivatePort, b.PrivatePort), cmp.Compare(a.Type, b.Type), a.IP.Compare(b.IP))
	})
	var out []string
	for _, p := range ports {
		t := fmt.Sprintf("%d/%s", p.PrivatePort, p.Type)
		if p.PublicPort > 0 {
			ip := "0.0.0.0"
			if p.IP.IsValid() {
				ip = p.IP.String()
			}
			if strings.Contains(ip, ":") {
				ip = "[" + ip + "]"
			}
			t = fmt.Sprintf("%s:%d->%s", ip, p.PublicPort, t)
		}
		out = append(out, t)
	}
	return strings.Join(slices.Compact(out), ", ")
}

func (a *app) cmdPort() *command.Command {
	proto, index := "tcp", 0
	return &command.Command{Name: "port", Args: "SERVICE PORT", Short: "Show where a service's port is published", Min: 2, Max: 2, Complete: []string{"service", ""},
		Flags: func(f *command.FlagSet) {
			f.String(&proto, "protocol", "", "tcp or udp")
			f.Int(&index, "index", "", "Which container of the service")
		},
		Run: func(ctx context.Context, args []string) error {
			n, err := strconv.ParseUint(args[1], 10, 16)
			if err != nil {
				return fmt.Errorf("%q is not a port", args[1])
			}
			name, err := a.projectName(ctx)
			if err != nil {
				return err
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			c, err := e.One(ctx, name, args[0], index, false, engine.WithOneOff)
			if err != nil {
				return err
			}
			var have []string
			for _, p := range c.Ports {
				if p.PrivatePort == uint16(n) && p.Type == strings.ToLower(proto) {
					ip := p.IP
					if !ip.IsValid() {
						ip = netip.IPv4Unspecified()
					}
					fmt.Fprintln(a.out, netip.AddrPortFrom(ip, p.PublicPort))
					return nil
				}
				have = append(have, fmt.Sprintf("%d/%s", p.PublicPort, p.Type))
			}
			return fmt.Errorf("no port %d/%s for container %s: %s", n, proto, model.Name(&c), strings.Join(have, ", "))
		}}
}

func (a *app) cmdTop() *command.Command {
	return &command.Command{Name: "top", Args: "[SERVICE...]", Short: "List the processes of containers", Max: -1, Complete: []string{"service"},
		Run: func(ctx context.Context, args []string) error {
			p, err := a.named(ctx)
			if err != nil {
				return err
			}
			list, err := a.eng.Containers(ctx, p.Name, false, engine.WithOneOff, args...)
			if err != nil {
				return err
			}
			head := []string{"SERVICE", "#"}
			var rows []map[string]string
			for i := range list {
				t, err := a.eng.Client.ContainerTop(ctx, list[i].ID, "")
				if err != nil {
					return err
				}
				for _, pr := range t.Processes {
					row := map[string]string{"SERVICE": model.Service(&list[i]), "#": list[i].Labels[model.LabelNumber]}
					for j, v := range pr {
						if j >= len(t.Titles) {
							break
						}
						if !slices.Contains(head, t.Titles[j]) {
							head = append(head, t.Titles[j])
						}
						row[t.Titles[j]] = v
					}
					rows = append(rows, row)
				}
			}
			if len(rows) == 0 {
				return nil
			}
			// Commands are of any length: last.
			if i := slices.Index(head, "CMD"); i >= 0 {
				head = append(slices.Delete(head, i, i+1), "CMD")
			}
			lines := [][]string{head}
			for _, r := range rows {
				line := make([]string, len(head))
				for i, h := range head {
					if line[i] = r[h]; line[i] == "" {
						line[i] = "-"
					}
				}
				lines = append(lines, line)
			}
			return format.Align(a.out, lines)
		}}
}

// imageRow is a container's image.
type imageRow struct {
	ID, ContainerName, Repository, Tag, Platform string
	Size                                         int64
	Created, LastTagTime                         time.Time
}

func (a *app) cmdImages() *command.Command {
	quiet, jsonOut, tmpl := false, false, "table"
	return &command.Command{Name: "images", Args: "[SERVICE...]", Short: "List the images of containers", Max: -1, Complete: []string{"service"},
		Flags: func(f *command.FlagSet) {
			f.String(&tmpl, "format", "", "table or json")
			f.Bool(&jsonOut, "json", "", "Same as --format json")
			f.Bool(&quiet, "quiet", "q", "Show ids only")
		},
		Run: func(ctx context.Context, args []string) error {
			if jsonOut {
				tmpl = "json"
			}
			name, err := a.projectName(ctx)
			if err != nil {
				return err
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			list, err := e.Containers(ctx, name, true, engine.WithOneOff, args...)
			if err != nil {
				return err
			}
			rows := make([]imageRow, len(list))
			for i := range list {
				c := &list[i]
				in, _, err := e.Client.ImageInspect(ctx, c.Image, "")
				if client.IsNotFound(err) {
					in, _, err = e.Client.ImageInspect(ctx, c.ImageID, "")
				}
				if err != nil {
					return err
				}
				r := &rows[i]
				*r = imageRow{ID: in.ID, ContainerName: model.Name(c), Platform: strings.TrimSuffix(in.Os+"/"+in.Architecture+"/"+in.Variant, "/"), Size: in.Size, LastTagTime: in.Metadata.LastTagTime}
				r.Created, _ = time.Parse(time.RFC3339Nano, in.Created)
				if !strings.HasPrefix(c.Image, "sha256:") {
					r.Repository, r.Tag = client.SplitTag(c.Image)
					if r.Tag == "" {
						r.Tag = "latest"
					}
				}
				if r.LastTagTime.IsZero() {
					r.LastTagTime = r.Created
				}
			}
			if quiet {
				var seen []string
				for _, r := range rows {
					if id := strings.TrimPrefix(r.ID, "sha256:"); !slices.Contains(seen, id) {
						seen = append(seen, id)
						fmt.Fprintln(a.out, id)
					}
				}
				return nil
			}
			switch tmpl {
			case "json":
				return printJSON(a, rows)
			case "table":
			default:
				return fmt.Errorf("unsupported format %q: use table or json", tmpl)
			}
			lines := [][]string{{"CONTAINER", "REPOSITORY", "TAG", "PLATFORM", "IMAGE ID", "SIZE", "CREATED"}}
			for _, r := range rows {
				id := strings.TrimPrefix(r.ID, "sha256:")
				lines = append(lines, []string{r.ContainerName, cmp.Or(r.Repository, "<none>"), cmp.Or(r.Tag, "<none>"), r.Platform, id[:min(12, len(id))], format.Size(r.Size), format.Ago(r.LastTagTime, time.Now())})
			}
			return format.Align(a.out, lines)
		}}
}

func printJSON(a *app, v any) error {
	b, err := json.Marshal(v)
	if err == nil {
		_, err = fmt.Fprintf(a.out, "%s\n", b)
	}
	return err
}
