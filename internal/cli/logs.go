package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/format"
	"github.com/cloudos-io/cloudos/internal/cli/notation"
)

func (a *App) cmdLogs() *command.Command {
	o := client.LogOptions{Stdout: true, Stderr: true, Tail: "all"}
	return &command.Command{Name: "logs", Args: "CONTAINER", Short: "Show what a container wrote", Min: 1, Max: 1, Complete: []string{"container"},
		Flags: func(f *command.FlagSet) {
			f.Bool(&o.Follow, "follow", "f", "Go on with what it writes")
			f.Bool(&o.Timestamps, "timestamps", "t", "Show when each line was written")
			f.Bool(&o.Details, "details", "", "Show the log driver's extra fields")
			f.String(&o.Since, "since", "", "From this time on (2006-01-02T15:04:05Z) or so long ago (10m)")
			f.String(&o.Until, "until", "", "Up to this time or so long ago")
			f.String(&o.Tail, "tail", "n", "Lines from the end")
		},
		Run: func(ctx context.Context, args []string) error {
			var err error
			if o.Since, err = a.point(o.Since); err != nil {
				return err
			}
			if o.Until, err = a.point(o.Until); err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			return c.ContainerLogs(ctx, args[0], o, a.Stdout, a.Stderr)
		}}
}

// point makes a point in time of what people write, in the API's form.
func (a *App) point(s string) (string, error) {
	if s == "" {
		return "", nil
	}
	t, err := notation.Time(s, time.Now())
	if err != nil {
		return "", exitWith(exitEngine, err)
	}
	return client.Since(t), nil
}

func (a *App) cmdTop() *command.Command {
	jsonOut := false
	return &command.Command{Name: "top", Args: "CONTAINER [ps OPTIONS]", Short: "List the processes of a container", Min: 1, Max: -1, Inner: true, Complete: []string{"running", ""},
		Flags: func(f *command.FlagSet) { f.Bool(&jsonOut, "json", "", "Print the processes as JSON, one a line") },
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			t, err := c.ContainerTop(ctx, args[0], strings.Join(args[1:], " "))
			if err != nil {
				return err
			}
			if jsonOut {
				return format.JSONLines(a.out, processes(&t))
			}
			lines := append([][]string{t.Titles}, t.Processes...)
			return format.Align(a.out, lines)
		}}
}

// processes gives each process as a map from title to value.
func processes(t *container.TopResponse) []map[string]string {
	out := make([]map[string]string, len(t.Processes))
	for i, p := range t.Processes {
		out[i] = make(map[string]string, len(p))
		for j, v := range p {
			if j < len(t.Titles) {
				out[i][t.Titles[j]] = v
			}
		}
	}
	return out
}

func (a *App) cmdDiff() *command.Command {
	jsonOut := false
	return &command.Command{Name: "diff", Args: "CONTAINER", Short: "List files that a container changed: A added, C changed, D deleted", Min: 1, Max: 1, Complete: []string{"container"},
		Flags: func(f *command.FlagSet) { f.Bool(&jsonOut, "json", "", "Print the API's objects as JSON, one a line") },
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			list, err := c.ContainerDiff(ctx, args[0])
			if err != nil {
				return err
			}
			if jsonOut {
				return format.JSONLines(a.out, list)
			}
			for _, ch := range list {
				kind := "C"
				switch ch.Kind {
				case container.ChangeAdd:
					kind = "A"
				case container.ChangeDelete:
					kind = "D"
				}
				fmt.Fprintln(a.out, kind, ch.Path)
			}
			return nil
		}}
}

func (a *App) cmdPort() *command.Command {
	jsonOut := false
	return &command.Command{Name: "port", Args: "CONTAINER [PRIVATE_PORT[/PROTO]]", Short: "List the published ports of a container", Min: 1, Max: 2, Complete: []string{"container", ""},
		Flags: func(f *command.FlagSet) {
			f.Bool(&jsonOut, "json", "", "Print one object a binding as JSON, one a line")
		},
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			info, _, err := c.ContainerInspect(ctx, args[0], false)
			if err != nil {
				return err
			}
			var ports network.PortMap
			if info.NetworkSettings != nil {
				ports = info.NetworkSettings.Ports
			}
			if len(args) == 2 {
				p, err := network.ParsePort(args[1])
				if err != nil {
					return fmt.Errorf("cannot use port %q: write 80 or 53/udp", args[1])
				}
				if len(ports[p]) == 0 {
					return fmt.Errorf("port %s of %s is not published", p, args[0])
				}
				if jsonOut {
					return format.JSONLines(a.out, bindings(network.PortMap{p: ports[p]}))
				}
				for _, b := range ports[p] {
					fmt.Fprintln(a.out, bindingText(b))
				}
				return nil
			}
			if jsonOut {
				return format.JSONLines(a.out, bindings(ports))
			}
			var lines []string
			for p, bs := range ports {
				for _, b := range bs {
					lines = append(lines, fmt.Sprintf("%s -> %s", p, bindingText(b)))
				}
			}
			slices.SortFunc(lines, naturally)
			for _, l := range lines {
				fmt.Fprintln(a.out, l)
			}
			return nil
		}}
}

// binding is a published port in JSON.
type binding struct {
	Port     string
	HostIP   string `json:"HostIp"`
	HostPort string
}

func bindings(ports network.PortMap) []binding {
	var out []binding
	for p, bs := range ports {
		for _, b := range bs {
			out = append(out, binding{p.String(), b.HostIP.String(), b.HostPort})
		}
	}
	slices.SortFunc(out, func(x, y binding) int { return naturally(x.Port+x.HostIP+x.HostPort, y.Port+y.HostIP+y.HostPort) })
	return out
}

func bindingText(b network.PortBinding) string {
	ip := "0.0.0.0"
	if b.HostIP.IsValid() {
		ip = b.HostIP.String()
		if b.HostIP.Is6() {
			ip = "[" + ip + "]"
		}
	}
	return ip + ":" + b.HostPort
}

// naturally orders text with the numbers in it as numbers.
func naturally(a, b string) int {
	for a != "" && b != "" {
		na, nb := digits(a), digits(b)
		if na > 0 && nb > 0 {
			x, y := strings.TrimLeft(a[:na], "0"), strings.TrimLeft(b[:nb], "0")
			if len(x) != len(y) {
				return len(x) - len(y)
			}
			if c := strings.Compare(x, y); c != 0 {
				return c
			}
			a, b = a[na:], b[nb:]
			continue
		}
		if a[0] != b[0] {
			return int(a[0]) - int(b[0])
		}
		a, b = a[1:], b[1:]
	}
	return len(a) - len(b)
}

func digits(s string) int {
	n := 0
	for n < len(s) && s[n] >= '0' && s[n] <= '9' {
		n++
	}
	return n
}
