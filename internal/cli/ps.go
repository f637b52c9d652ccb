package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/format"
)

func (a *App) cmdPs() *command.Command {
	var o listFlags
	var all, latest, size, everywhere bool
	last := -1
	return &command.Command{Name: "ls", Aliases: []string{"list", "ps"}, Short: "List containers",
		Example: `servin ps -a
servin ps --filter status=exited --format '{{.Names}}: {{.Status}}'
servin ps --json`,
		Flags: func(f *command.FlagSet) {
			o.declare(f, true)
			f.Bool(&all, "all", "a", "Show stopped containers too")
			f.Bool(&latest, "latest", "l", "Show the newest container only, in any state")
			f.Add("last", "n", "int", "Show the newest n containers, in any state", func(s string) error {
				var n int64
				err := parseInt(s, &n)
				last = int(n)
				return err
			})
			f.Bool(&size, "size", "s", "Measure the containers' files")
			f.Bool(&everywhere, "all-namespaces", "A", "Show containers of Kubernetes' pods too")
		},
		Run: func(ctx context.Context, args []string) error {
			filters, err := readFilters(o.filters)
			if err != nil {
				return err
			}
			if everywhere {
				filters.Add("namespace", "*")
			}
			lo := client.ContainerListOptions{All: all, Size: size, Filters: filters}
			if latest {
				last = 1
			}
			if last > 0 {
				lo.Limit, lo.All = last, true
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			if o.json {
				raw, err := client.ContainerListAs[json.RawMessage](ctx, c, lo)
				if err != nil {
					return err
				}
				return format.JSONLines(a.out, raw)
			}
			o.fromFile = a.cfg.PsFormat
			lo.Size = lo.Size || strings.Contains(o.template(), ".Size")
			list, err := client.ContainerListAs[containerRow](ctx, c, lo)
			if err != nil {
				return err
			}
			return containerColumns(o.noTrunc, size, everywhere, time.Now()).Print(a.out, list, o.options())
		}}
}

// containerRow is what a list shows of a container. What the default table does
// not show stays as it is until somebody asks: decoding all of it takes longer
// than the rest of the command.
type containerRow struct {
	ID                      string `json:"Id"`
	Names                   []string
	Image, ImageID, Command string
	Created                 int64
	Ports                   []container.PortSummary
	State, Status           string
	SizeRw, SizeRootFs      int64
	Labels                  map[string]string

	Mounts, NetworkSettings, Health, ImageManifestDescriptor json.RawMessage
}

// later decodes a field that was left as it is.
func later[T any](raw json.RawMessage) (v T) {
	if len(raw) > 0 {
		json.Unmarshal(raw, &v)
	}
	return v
}

func containerColumns(noTrunc, size, pods bool, now time.Time) *format.List[containerRow] {
	type C = containerRow
	l := &format.List[C]{
		Quiet:  "ID",
		Labels: func(c C) map[string]string { return c.Labels },
		Table:  []string{"ID", "Image", "Command", "RunningFor", "Status", "Ports", "Names"},
		Columns: []format.Column[C]{
			{Name: "ID", Heading: "CONTAINER ID", Text: func(c C) string { return trunc(c.ID, noTrunc) }},
			{Name: "Names", Heading: "NAMES", Text: func(c C) string { return containerNames(c.Names, noTrunc) }},
			{Name: "Pod", Heading: "POD", Text: func(c C) string { return c.Labels[api.LabelPod] }},
			{Name: "Image", Heading: "IMAGE", Text: func(c C) string { return containerImage(c, noTrunc) }},
			{Name: "Command", Heading: "COMMAND", Text: func(c C) string {
				if noTrunc {
					return strconv.Quote(c.Command)
				}
				return strconv.Quote(format.Ellipsis(c.Command, 20))
			}},
			{Name: "CreatedAt", Heading: "CREATED AT", Text: func(c C) string { return time.Unix(c.Created, 0).String() }},
			{Name: "RunningFor", Heading: "CREATED", Text: func(c C) string { return format.Ago(time.Unix(c.Created, 0), now) }},
			{Name: "Ports", Heading: "PORTS", Text: func(c C) string { return portsText(c.Ports) }},
			{Name: "State", Heading: "STATE", Text: func(c C) string { return c.State }},
			{Name: "Status", Heading: "STATUS", Text: func(c C) string { return c.Status }},
			{Name: "HealthStatus", Heading: "HEALTH", Text: func(c C) string {
				return string(later[container.HealthSummary](c.Health).Status)
			}},
			{Name: "Size", Heading: "SIZE", Text: func(c C) string {
				s := format.Size(c.SizeRw)
				if c.SizeRootFs > 0 {
					s += " (virtual " + format.Size(c.SizeRootFs) + ")"
				}
				return s
			}},
			{Name: "Labels", Heading: "LABELS", Text: func(c C) string { return labelText(c.Labels) }},
			{Name: "Mounts", Heading: "MOUNTS", Text: func(c C) string {
				var list []string
				for _, m := range later[[]container.MountPoint](c.Mounts) {
					name := m.Name
					if name == "" {
						name = m.Source
					}
					if !noTrunc {
						name = format.Ellipsis(name, 15)
					}
					list = append(list, name)
				}
				return strings.Join(list, ",")
			}},
			{Name: "LocalVolumes", Heading: "LOCAL VOLUMES", Text: func(c C) string {
				n := 0
				for _, m := range later[[]container.MountPoint](c.Mounts) {
					if m.Driver == "local" {
						n++
					}
				}
				return strconv.Itoa(n)
			}},
			{Name: "Networks", Heading: "NETWORKS", Text: func(c C) string {
				var list []string
				for n := range later[struct{ Networks map[string]json.RawMessage }](c.NetworkSettings).Networks {
					list = append(list, n)
				}
				slices.Sort(list)
				return strings.Join(list, ",")
			}},
			{Name: "Platform", Heading: "PLATFORM", Text: func(c C) string {
				p := later[struct {
					Platform struct{ OS, Architecture, Variant string }
				}](c.ImageManifestDescriptor).Platform
				return strings.Trim(p.OS+"/"+p.Architecture+"/"+p.Variant, "/")
			}},
		},
	}
	if pods {
		l.Table = append(l.Table, "Pod")
	}
	if size {
		l.Table = append(l.Table, "Size")
	}
	return l
}

// containerNames drops the leading slashes; names through links only in full.
func containerNames(names []string, all bool) string {
	var out []string
	for _, n := range names {
		n = strings.TrimPrefix(n, "/")
		if all || !strings.Contains(n, "/") {
			out = append(out, n)
		}
	}
	return strings.Join(out, ",")
}

func containerImage(c containerRow, noTrunc bool) string {
	if c.Image == "" {
		return "<no image>"
	}
	if noTrunc {
		return c.Image
	}
	if c.Image == c.ImageID || strings.HasPrefix(c.Image, "sha256:") {
		return short(c.Image)
	}
	name, digest, ok := strings.Cut(c.Image, "@")
	if ok && strings.HasPrefix(digest, "sha256:") {
		return name
	}
	return c.Image
}

// portsText lists ports, neighbours joined to ranges:
// "0.0.0.0:8000-8002->80-82/tcp, 9000/tcp".
func portsText(ports []container.PortSummary) string {
	type run struct {
		ip        netip.Addr
		proto     string
		pub, priv uint16
		length    uint16
		published bool
	}
	list := slices.Clone(ports)
	slices.SortFunc(list, func(a, b container.PortSummary) int {
		return cmp.Or(
			cmp.Compare(bToI(a.PublicPort == 0), bToI(b.PublicPort == 0)),
			cmp.Compare(a.Type, b.Type),
			a.IP.Compare(b.IP),
			cmp.Compare(a.PrivatePort, b.PrivatePort),
			cmp.Compare(a.PublicPort, b.PublicPort))
	})
	var runs []run
	for _, p := range list {
		if n := len(runs); n > 0 {
			r := &runs[n-1]
			next := r.published == (p.PublicPort != 0) && r.proto == p.Type && r.ip == p.IP && p.PrivatePort == r.priv+r.length
			if next && (!r.published || p.PublicPort == r.pub+r.length) {
				r.length++
				continue
			}
		}
		runs = append(runs, run{ip: p.IP, proto: p.Type, pub: p.PublicPort, priv: p.PrivatePort, length: 1, published: p.PublicPort != 0})
	}
	span := func(first, n uint16) string {
		if n == 1 {
			return strconv.Itoa(int(first))
		}
		return fmt.Sprintf("%d-%d", first, first+n-1)
	}
	out := make([]string, 0, len(runs))
	for _, r := range runs {
		s := span(r.priv, r.length) + "/" + r.proto
		if r.published {
			ip := ""
			if r.ip.IsValid() {
				ip = r.ip.String()
				if r.ip.Is6() {
					ip = "[" + ip + "]"
				}
				ip += ":"
			}
			s = ip + span(r.pub, r.length) + "->" + s
		}
		out = append(out, s)
	}
	return strings.Join(out, ", ")
}

func bToI(b bool) int {
	if b {
		return 1
	}
	return 0
}
