package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/system"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/format"
	"github.com/cloudos-io/cloudos/internal/cli/terminal"
)

func (a *App) system() []*command.Command {
	return []*command.Command{a.cmdInfo(), a.cmdDf(), a.cmdSystemPrune(), a.cmdEvents(), a.cmdDoctor(), a.cmdAdopt(), a.cmdAlerts(), a.cmdPolicy(), a.cmdAudit(), a.cmdDebugShell(), a.cmdShutdown(), a.cmdDrained(), a.cmdDialStdio()}
}

// versionOutput is what version shows and templates see.
type versionOutput struct {
	Client clientVersion
	Server *system.VersionResponse `json:",omitempty"`
}

type clientVersion struct {
	Version, APIVersion, GoVersion, GitCommit, Os, Arch, Context string
}

func (a *App) cmdVersion() *command.Command {
	var o inspectFlags
	return &command.Command{Name: "version", Short: "Show the versions of the command line and the engine", Flags: o.declare,
		Run: func(ctx context.Context, args []string) error {
			v := versionOutput{Client: clientVersion{Version: a.Version, APIVersion: client.APIVersion, GoVersion: runtime.Version(),
				GitCommit: a.Commit(), Os: runtime.GOOS, Arch: runtime.GOARCH}}
			x, err := a.context()
			if err != nil {
				return err
			}
			v.Client.Context = x.Name
			c, err := a.client()
			if err != nil {
				return err
			}
			s, serr := c.ServerVersion(ctx)
			if serr == nil {
				v.Server = &s
			}
			if o.format != "" || o.json {
				if err := printObjects(a, []versionOutput{v}, &o); err != nil {
					return err
				}
				return serr
			}
			a.printVersion(&v)
			return serr
		}}
}

func (a *App) printVersion(v *versionOutput) {
	lines := [][2]string{{"Client: Servin", ""}, {" Version:", v.Client.Version}, {" API version:", v.Client.APIVersion}, {" Go version:", v.Client.GoVersion},
		{" Git commit:", v.Client.GitCommit}, {" OS/Arch:", v.Client.Os + "/" + v.Client.Arch}, {" Context:", v.Client.Context}}
	if s := v.Server; s != nil {
		lines = append(lines, [2]string{}, [2]string{"Engine: " + pick(s.Platform.Name, "Servin"), ""}, [2]string{" Version:", s.Version},
			[2]string{" API version:", fmt.Sprintf("%s (minimum %s)", s.APIVersion, s.MinAPIVersion)}, [2]string{" Go version:", s.GoVersion},
			[2]string{" Git commit:", s.GitCommit}, [2]string{" Built:", s.BuildTime}, [2]string{" OS/Arch:", s.Os + "/" + s.Arch},
			[2]string{" Kernel:", s.KernelVersion})
		for _, c := range s.Components {
			if c.Name == "Engine" || c.Name == "Servin" {
				continue
			}
			lines = append(lines, [2]string{" " + c.Name + ":", c.Version})
		}
	}
	for _, l := range lines {
		if l[1] == "" {
			fmt.Fprintln(a.out, l[0])
			continue
		}
		fmt.Fprintf(a.out, "%-18s %s\n", l[0], l[1])
	}
}

func (a *App) cmdInfo() *command.Command {
	var o inspectFlags
	return &command.Command{Name: "info", Short: "Show what the engine and its host are like", Flags: o.declare,
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			info, raw, err := c.Info(ctx)
			if err != nil {
				return err
			}
			if o.json || o.format == "json" {
				return format.Object(a.out, info, raw, "json")
			}
			if o.format != "" {
				return format.Object(a.out, info, raw, o.format)
			}
			a.printInfo(&info)
			return nil
		}}
}

func (a *App) printInfo(i *system.Info) {
	p := func(name string, v any) {
		if s := fmt.Sprint(v); s != "" {
			fmt.Fprintf(a.out, "%s: %s\n", name, s)
		}
	}
	p("Engine version", i.ServerVersion)
	p("Containers", i.Containers)
	p(" Running", i.ContainersRunning)
	p(" Paused", i.ContainersPaused)
	p(" Stopped", i.ContainersStopped)
	p("Images", i.Images)
	p("Storage driver", i.Driver)
	for _, s := range i.DriverStatus {
		p(" "+s[0], s[1])
	}
	p("Logging driver", i.LoggingDriver)
	p("Cgroup driver", i.CgroupDriver)
	p("Cgroup version", i.CgroupVersion)
	p("Volume drivers", strings.Join(i.Plugins.Volume, " "))
	p("Network drivers", strings.Join(i.Plugins.Network, " "))
	p("Log drivers", strings.Join(i.Plugins.Log, " "))
	var names []string
	for n := range i.Runtimes {
		names = append(names, n)
	}
	slices.Sort(names)
	p("Runtimes", strings.Join(names, " "))
	p("Default runtime", i.DefaultRuntime)
	p("Init binary", i.InitBinary)
	p("Security options", "")
	if len(i.SecurityOptions) > 0 {
		fmt.Fprintln(a.out, "Security options:")
		for _, s := range i.SecurityOptions {
			fmt.Fprintf(a.out, " %s\n", strings.TrimPrefix(s, "name="))
		}
	}
	if i.FirewallBackend != nil {
		p("Firewall", i.FirewallBackend.Driver)
	}
	for _, d := range i.DiscoveredDevices {
		p("Device ("+d.Source+")", d.ID)
	}
	p("Kernel", i.KernelVersion)
	p("Operating system", i.OperatingSystem)
	p("Architecture", i.OSType+"/"+i.Architecture)
	p("CPUs", i.NCPU)
	p("Memory", format.BinarySize(uint64(max(0, i.MemTotal))))
	p("Name", i.Name)
	p("ID", i.ID)
	p("Root directory", i.DockerRootDir)
	p("HTTP proxy", i.HTTPProxy)
	p("HTTPS proxy", i.HTTPSProxy)
	p("No proxy", i.NoProxy)
	p("Labels", strings.Join(i.Labels, ", "))
	if i.RegistryConfig != nil {
		p("Registry mirrors", strings.Join(i.RegistryConfig.Mirrors, " "))
	}
	p("Live restore", i.LiveRestoreEnabled)
	for _, pool := range i.DefaultAddressPools {
		p("Address pool", fmt.Sprintf("%s, in networks of /%d", pool.Base, pool.Size))
	}
	a.warn(i.Warnings)
}

// dfRow is a line of df's summary.
type dfRow struct {
	kind                             string
	total, active, size, reclaimable int64
}

func (a *App) cmdDf() *command.Command {
	var o listFlags
	verbose := false
	return &command.Command{Name: "df", Short: "Show what images, containers and volumes take of the disk",
		Flags: func(f *command.FlagSet) {
			o.declareFormat(f)
			f.Bool(&verbose, "verbose", "v", "Show every object")
		},
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			du, raw, err := c.DiskUsage(ctx, nil, verbose)
			if err != nil {
				return err
			}
			if o.json {
				return format.Object(a.out, du, raw, "json")
			}
			if verbose && o.format == "" {
				return a.dfVerbose(&du)
			}
			return dfColumns().Print(a.out, dfRows(&du), o.options())
		}}
}

func dfRows(du *system.DiskUsage) []dfRow {
	rows := []dfRow{{kind: "Images"}, {kind: "Containers"}, {kind: "Local Volumes"}, {kind: "Build Cache"}}
	if u := du.ImageUsage; u != nil {
		rows[0] = dfRow{"Images", u.TotalCount, u.ActiveCount, u.TotalSize, u.Reclaimable}
	}
	if u := du.ContainerUsage; u != nil {
		rows[1] = dfRow{"Containers", u.TotalCount, u.ActiveCount, u.TotalSize, u.Reclaimable}
	}
	if u := du.VolumeUsage; u != nil {
		rows[2] = dfRow{"Local Volumes", u.TotalCount, u.ActiveCount, u.TotalSize, u.Reclaimable}
	}
	if u := du.BuildCacheUsage; u != nil {
		rows[3] = dfRow{"Build Cache", u.TotalCount, u.ActiveCount, u.TotalSize, u.Reclaimable}
	}
	return rows
}

func dfColumns() *format.List[dfRow] {
	type R = dfRow
	return &format.List[R]{Quiet: "Type", Table: []string{"Type", "TotalCount", "Active", "Size", "Reclaimable"},
		Columns: []format.Column[R]{
			{Name: "Type", Heading: "TYPE", Text: func(r R) string { return r.kind }},
			{Name: "TotalCount", Heading: "TOTAL", Text: func(r R) string { return fmt.Sprint(r.total) }},
			{Name: "Active", Heading: "ACTIVE", Text: func(r R) string { return fmt.Sprint(r.active) }},
			{Name: "Size", Heading: "SIZE", Text: func(r R) string { return format.Size(r.size) }},
			{Name: "Reclaimable", Heading: "RECLAIMABLE", Text: func(r R) string {
				s := format.Size(r.reclaimable)
				if r.size > 0 {
					s += fmt.Sprintf(" (%d%%)", r.reclaimable*100/r.size)
				}
				return s
			}},
		}}
}

func (a *App) dfVerbose(du *system.DiskUsage) error {
	now := time.Now()
	if u := du.ImageUsage; u != nil {
		fmt.Fprint(a.out, "Images:\n\n")
		l := imageColumns(false, false, now)
		l.Table = []string{"Repository", "Tag", "ID", "CreatedSince", "Size", "SharedSize", "UniqueSize", "Containers"}
		if err := l.Print(a.out, imageRows(u.Items, false), format.Options{}); err != nil {
			return err
		}
	}
	if u := du.ContainerUsage; u != nil {
		fmt.Fprint(a.out, "\nContainers:\n\n")
		l := containerColumns(false, true, false, now)
		l.Table = []string{"ID", "Image", "Command", "LocalVolumes", "Size", "RunningFor", "Status", "Names"}
		if err := l.Print(a.out, rowsOf(u.Items), format.Options{}); err != nil {
			return err
		}
	}
	if u := du.VolumeUsage; u != nil {
		fmt.Fprint(a.out, "\nVolumes:\n\n")
		l := volumeColumns()
		l.Table = []string{"Name", "Links", "Size"}
		if err := l.Print(a.out, u.Items, format.Options{}); err != nil {
			return err
		}
	}
	if u := du.BuildCacheUsage; u != nil {
		fmt.Fprintf(a.out, "\nBuild cache: %s\n", format.Size(u.TotalSize))
	}
	return nil
}

// rowsOf makes rows of whole summaries.
func rowsOf(list []container.Summary) []containerRow {
	rows := make([]containerRow, len(list))
	for i, c := range list {
		mounts, _ := json.Marshal(c.Mounts)
		rows[i] = containerRow{ID: c.ID, Names: c.Names, Image: c.Image, ImageID: c.ImageID, Command: c.Command, Created: c.Created,
			State: string(c.State), Status: c.Status, SizeRw: c.SizeRw, SizeRootFs: c.SizeRootFs, Labels: c.Labels, Mounts: mounts}
	}
	return rows
}

func (a *App) cmdEvents() *command.Command {
	var o listFlags
	since, until := "", ""
	return &command.Command{Name: "events", Short: "Show what happens in the engine, as it happens",
		Flags: func(f *command.FlagSet) {
			f.Strings(&o.filters, "filter", "f", "Show those that match, key=value").Kind("filter")
			o.declareFormat(f)
			f.String(&since, "since", "", "From this time on, or so long ago (10m)")
			f.String(&until, "until", "", "Up to this time, then leave")
		},
		Run: func(ctx context.Context, args []string) error {
			filters, err := readFilters(o.filters)
			if err != nil {
				return err
			}
			eo := client.EventsOptions{Filters: filters}
			if eo.Since, err = a.point(since); err != nil {
				return err
			}
			if eo.Until, err = a.point(until); err != nil {
				return err
			}
			show := func(m events.Message) error {
				_, err := fmt.Fprintln(a.Stdout, eventText(&m))
				return err
			}
			switch {
			case o.json || o.format == "json":
				show = func(m events.Message) error { return format.JSONLines(a.Stdout, []events.Message{m}) }
			case o.format != "":
				t, err := format.Parse(o.format)
				if err != nil {
					return err
				}
				show = func(m events.Message) error {
					if err := t.Execute(a.Stdout, m); err != nil {
						return err
					}
					_, err := io.WriteString(a.Stdout, "\n")
					return err
				}
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			return c.Events(ctx, eo, show)
		}}
}

func eventText(m *events.Message) string {
	t := time.Unix(m.Time, 0)
	if m.TimeNano != 0 {
		t = time.Unix(0, m.TimeNano)
	}
	s := fmt.Sprintf("%s %s %s %s", t.Format("2006-01-02T15:04:05.000000000Z07:00"), m.Type, m.Action, m.Actor.ID)
	if len(m.Actor.Attributes) > 0 {
		s += " (" + strings.ReplaceAll(labelText(m.Actor.Attributes), ",", ", ") + ")"
	}
	return s
}

func (a *App) cmdDoctor() *command.Command {
	jsonOut, verbose, fix, yes := false, false, false, false
	return &command.Command{Name: "doctor", Short: "Check the host and say what to mend",
		Long: `Check the host and say what to mend.

With --fix, what the engine can mend itself is shown, and done if you agree: it lets
the host's own firewall (nftables, ufw, firewalld, Docker's rules) accept what is
forwarded from and to the bridges of networks, and nothing else. The accepts go with
their network.`,
		Flags: func(f *command.FlagSet) {
			f.Bool(&jsonOut, "json", "", "Print the findings as JSON, one a line")
			f.Bool(&verbose, "verbose", "v", "Show what is well, in full")
			f.Bool(&fix, "fix", "", "Offer to mend what the engine can, and do it on a yes")
			f.Bool(&yes, "yes", "y", "With --fix: do not ask")
		},
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			list, err := c.Doctor(ctx)
			if err != nil {
				return err
			}
			if fix {
				if list, err = a.fixFindings(ctx, c, list, yes); err != nil {
					return err
				}
			}
			bad := 0
			for _, f := range list {
				if f.Severity == "error" {
					bad++
				}
			}
			if jsonOut {
				if err := format.JSONLines(a.out, list); err != nil {
					return err
				}
			} else {
				for _, f := range list {
					fmt.Fprintf(a.out, "%-9s %s\n", "["+f.Severity+"]", f.Title)
					if f.Severity == "ok" && !verbose {
						continue
					}
					for _, l := range []string{f.Detail, prefixed("fix: ", f.Fix)} {
						if l != "" {
							fmt.Fprintf(a.out, "          %s\n", strings.ReplaceAll(l, "\n", "\n          "))
						}
					}
				}
			}
			switch bad {
			case 0:
				return nil
			case 1:
				return errors.New("1 finding is an error")
			}
			return fmt.Errorf("%d findings are errors", bad)
		}}
}

// fixFindings has the engine do what it offers, on consent, and looks again.
func (a *App) fixFindings(ctx context.Context, c *client.Client, list []api.Finding, yes bool) ([]api.Finding, error) {
	var actions []string
	for _, f := range list {
		if f.Action != "" {
			actions = append(actions, f.Action)
		}
	}
	if len(actions) == 0 {
		fmt.Fprintln(a.Stderr, "There is nothing that the engine could mend.")
		return list, nil
	}
	fmt.Fprintln(a.Stderr, "The engine can:")
	for _, s := range actions {
		fmt.Fprintf(a.Stderr, "  %s\n", s)
	}
	if !yes {
		if !terminal.Is(a.Stdin) {
			return nil, fmt.Errorf("%w: this changes the host's firewall; say --yes to do it without being asked", errNotConfirmed)
		}
		ok, err := a.yesNo("Go on?")
		if err != nil {
			return nil, err
		}
		if !ok {
			return nil, exitWith(exitFailure, errNotConfirmed)
		}
	}
	rep, err := c.Fix(ctx, actions)
	if err != nil {
		return nil, err
	}
	for _, s := range rep.Done {
		fmt.Fprintf(a.Stderr, "Done: %s\n", s)
	}
	return c.Doctor(ctx)
}

func prefixed(p, s string) string {
	if s == "" {
		return ""
	}
	return p + s
}

func (a *App) cmdShutdown() *command.Command {
	keep, force := false, false
	return &command.Command{Name: "shutdown", Short: "Stop the engine and its containers, and take every trace of them off the host",
		Long: `Stop the engine.

All containers are stopped and every mount, link, rule and cgroup is taken away; the
state on disk stays. With --keep-containers the engine alone stops: containers go on,
and the next engine takes them back.`,
		Flags: func(f *command.FlagSet) {
			f.Bool(&keep, "keep-containers", "", "Stop the engine alone; containers go on")
			f.Bool(&force, "force", "f", "Do not ask")
		},
		Run: func(ctx context.Context, args []string) error {
			if !keep && a.inIsTerminal() {
				if err := a.confirm(&pruneFlags{force: force}, "stops the engine and all of its containers"); err != nil {
					return err
				}
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			return c.Shutdown(ctx, !keep)
		}}
}

func (a *App) cmdDrained() *command.Command {
	full := false
	return &command.Command{Name: "drained", Short: "Wait until the remains of ended containers are cleared away", Hidden: true,
		Flags: func(f *command.FlagSet) {
			f.Bool(&full, "full", "", "Wait until the pool of parked sandboxes is full, too")
		},
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return c.Drained(ctx, full)
		}}
}

// dial-stdio joins standard streams with the engine's socket: the far end of an
// ssh host.
func (a *App) cmdDialStdio() *command.Command {
	return &command.Command{Name: "dial-stdio", Short: "Join standard input and output with the engine's socket", Hidden: true,
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			k, err := c.Dial(ctx)
			if err != nil {
				return err
			}
			defer k.Close()
			go func() {
				io.Copy(k, a.Stdin)
				if cw, ok := k.(interface{ CloseWrite() error }); ok {
					cw.CloseWrite()
				}
			}()
			_, err = io.Copy(a.Stdout, k)
			return err
		}}
}
