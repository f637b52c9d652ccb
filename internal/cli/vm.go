package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/docker/go-units"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/format"
	"github.com/cloudos-io/cloudos/internal/cli/terminal"
)

// exitOff is what vm status exits with when the machine is off, as service
// scripts do.
const exitOff = 3

func (a *App) vm() []*command.Command {
	return []*command.Command{a.cmdVMStatus(), a.cmdVMStart(), a.cmdVMStop(), a.cmdVMRestart(), a.cmdVMReset(), a.cmdVMConsole(), a.cmdVMLogs(), a.cmdVMConfig()}
}

// vmStatus asks a servin-vmd; where none runs and none left a machine, it is off.
func (a *App) vmStatus(ctx context.Context) (api.VMStatus, error) {
	place := a.place()
	if !isFile(filepath.Join(place.State, "machine.json")) {
		v, err := client.NewVM(place.Control())
		if err != nil {
			return api.VMStatus{}, err
		}
		defer v.Close()
		st, err := v.Status(ctx)
		var ce *client.ConnectError
		if errors.As(err, &ce) {
			return api.VMStatus{State: api.VMOff, Socket: place.Engine()}, nil
		}
		return st, err
	}
	v, err := a.vmd(ctx)
	if err != nil {
		return api.VMStatus{}, err
	}
	defer v.Close()
	return v.Status(ctx)
}

func (a *App) cmdVMStatus() *command.Command {
	jsonOut := false
	return &command.Command{Name: "status", Short: "Show how the virtual machine is",
		Long:  "Show how the virtual machine is. It is not woken.\nExits with 0 when it is up (running or sleeping), with 3 when it is off.",
		Flags: func(f *command.FlagSet) { f.Bool(&jsonOut, "json", "", "Print JSON") },
		Run: func(ctx context.Context, args []string) error {
			st, err := a.vmStatus(ctx)
			if err != nil {
				return err
			}
			if jsonOut {
				if err := format.JSONLines(a.out, []api.VMStatus{st}); err != nil {
					return err
				}
			} else {
				a.printVM(st)
			}
			switch st.State {
			case api.VMRunning, api.VMSleeping:
				return nil
			case api.VMSafe:
				return exitWith(exitFailure, nil)
			}
			return exitWith(exitOff, nil)
		}}
}

func (a *App) printVM(st api.VMStatus) {
	line := func(name, text string, args ...any) {
		fmt.Fprintf(a.out, "%-9s %s\n", name+":", fmt.Sprintf(text, args...))
	}
	since := ""
	if !st.Since.IsZero() {
		since = " since " + format.Duration(time.Since(st.Since))
	}
	line("State", "%s%s", st.State, since)
	if st.Error != "" {
		line("Problem", "%s", st.Error)
	}
	if st.Driver != "" {
		text := st.Driver
		if st.Accelerator != "" {
			text += ", " + st.Accelerator
		}
		line("Driver", "%s", text)
	}
	if st.Version != "" {
		line("Image", "CloudOS %s, Linux %s (%s)", st.Version, st.Kernel, st.Image)
	}
	line("Engine", "unix://%s", st.Socket)
	if c := st.Config; c.CPUs > 0 {
		line("CPUs", "%d", c.CPUs)
		memory := format.BinarySize(uint64(c.MemoryMiB) << 20)
		if st.Memory.Guest > 0 {
			memory += fmt.Sprintf(", %s used in it", format.BinarySize(st.Memory.Guest-min(st.Memory.Guest, st.Memory.Available)))
		}
		if st.Memory.Host > 0 {
			memory += fmt.Sprintf(", %s of this computer's", format.BinarySize(st.Memory.Host))
		}
		line("Memory", "%s", memory)
		disk := format.BinarySize(uint64(c.DiskGiB) << 30)
		if st.Disk.Used > 0 {
			disk += fmt.Sprintf(", %s used in it", format.BinarySize(st.Disk.Used))
		}
		if st.Disk.Host > 0 {
			disk += fmt.Sprintf(", %s of this computer's", format.BinarySize(st.Disk.Host))
		}
		line("Disk", "%s", disk)
	}
	if st.State == api.VMRunning {
		line("Running", "%d containers", st.Containers)
	}
	for _, s := range st.Shares {
		line("Share", "%s%s", s.Path, problem(readOnly(s.ReadOnly), s.Error))
	}
	for _, p := range st.Ports {
		line("Port", "%s:%d/%s → %s%s", p.IP, p.Port, p.Protocol, p.Container, problem("", p.Error))
	}
	if len(st.Pending) > 0 {
		line("Pending", "%s: takes effect at the next start ('servin vm restart')", strings.Join(st.Pending, ", "))
	}
}

func readOnly(ro bool) string {
	if ro {
		return " (read-only)"
	}
	return ""
}

func problem(text, err string) string {
	if err != "" {
		return text + ": NOT THERE: " + err
	}
	return text
}

// operate runs one of servin-vmd's operations and shows its steps.
func (a *App) operate(ctx context.Context, title string, do func(*client.VM, func(api.VMProgress)) error) error {
	v, err := a.vmd(ctx)
	if err != nil {
		return err
	}
	defer v.Close()
	return do(v, a.showSteps(title))
}

func (a *App) cmdVMStart() *command.Command {
	return &command.Command{Name: "start", Short: "Start the virtual machine, or wake it",
		Run: func(ctx context.Context, args []string) error { return a.startMachine(ctx) }}
}

func (a *App) cmdVMStop() *command.Command {
	force := false
	return &command.Command{Name: "stop", Short: "Stop the virtual machine and the containers in it",
		Long:  "Stop the virtual machine and the containers in it, in order. Nothing is lost; the next command starts it again.",
		Flags: func(f *command.FlagSet) { f.Bool(&force, "force", "f", "Pull the plug instead") },
		Run: func(ctx context.Context, args []string) error {
			st, err := a.vmStatus(ctx)
			if err != nil || st.State == api.VMOff {
				return err
			}
			return a.operate(ctx, "Stopping the virtual machine", func(v *client.VM, each func(api.VMProgress)) error { return v.Stop(ctx, force, each) })
		}}
}

func (a *App) cmdVMRestart() *command.Command {
	return &command.Command{Name: "restart", Short: "Stop the virtual machine and start it with its newest settings and image",
		Run: func(ctx context.Context, args []string) error {
			return a.operate(ctx, "Restarting the virtual machine", func(v *client.VM, each func(api.VMProgress)) error { return v.Restart(ctx, each) })
		}}
}

func (a *App) cmdVMReset() *command.Command {
	o := pruneFlags{}
	return &command.Command{Name: "reset", Short: "Bring the virtual machine back to a clean state",
		Long: "Destroy everything in the virtual machine: containers, images, volumes, networks, secrets, build cache.\nIts settings and the folders it shares are kept.",
		Flags: func(f *command.FlagSet) {
			f.Bool(&o.force, "force", "f", "Do not ask")
		},
		Run: func(ctx context.Context, args []string) error {
			v, err := a.vmd(ctx)
			if err != nil {
				return err
			}
			defer v.Close()
			if !o.force {
				l, err := v.Loss(ctx)
				if err != nil {
					return err
				}
				if err := a.confirm(&o, "destroys "+losses(l)); err != nil {
					return err
				}
			}
			return v.Reset(ctx, a.showSteps("Resetting the virtual machine"))
		}}
}

// losses says what a reset destroys.
func losses(l api.VMLoss) string {
	if !l.Known {
		return fmt.Sprintf("everything in the virtual machine, which cannot be asked what that is (%s on disk)", format.BinarySize(l.DiskBytes))
	}
	text := fmt.Sprintf("%d containers (%d running), %d images, %d volumes and %d networks (%s on disk)",
		l.Containers, l.Running, l.Images, l.Volumes, l.Networks, format.BinarySize(l.DiskBytes))
	if len(l.VolumeNames) > 0 {
		text += "; volumes: " + strings.Join(l.VolumeNames, ", ")
	}
	return text
}

func (a *App) cmdVMConsole() *command.Command {
	return &command.Command{Name: "console", Short: "Show the virtual machine's serial line; ctrl-] leaves",
		Run: func(ctx context.Context, args []string) error {
			st, err := a.vmStatus(ctx)
			if err != nil {
				return err
			}
			if st.State == api.VMOff {
				return errors.New("the virtual machine is off: 'servin vm logs' shows what it said last")
			}
			v, err := a.vmd(ctx)
			if err != nil {
				return err
			}
			defer v.Close()
			conn, err := v.Console(ctx)
			if err != nil {
				return err
			}
			defer conn.Close()
			if terminal.Is(a.Stdin) {
				restore, err := terminal.Raw(a.Stdin, a.stdoutFile())
				if err != nil {
					return err
				}
				defer restore()
			}
			ended := make(chan error, 2)
			go func() { _, err := io.Copy(a.Stdout, conn); ended <- err }()
			go func() { ended <- typeUntil(conn, a.Stdin, 0x1d) }()
			return <-ended
		}}
}

// typeUntil copies what is typed until the key that leaves.
func typeUntil(w io.Writer, r io.Reader, leave byte) error {
	buf := make([]byte, 256)
	for {
		n, err := r.Read(buf)
		for i := range n {
			if buf[i] == leave {
				w.Write(buf[:i])
				return nil
			}
		}
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (a *App) cmdVMLogs() *command.Command {
	source, follow, lines := "console", false, 200
	return &command.Command{Name: "logs", Short: "Show what the virtual machine, its engine or servin-vmd wrote",
		Flags: func(f *command.FlagSet) {
			f.String(&source, "source", "s", "Whose: console, kernel, init, engine or vmd")
			f.Bool(&follow, "follow", "f", "Go on as more is written")
			f.Int(&lines, "tail", "n", "Lines from the end")
		},
		Run: func(ctx context.Context, args []string) error {
			v, err := a.vmd(ctx)
			if err != nil {
				return err
			}
			defer v.Close()
			return v.Logs(ctx, source, follow, lines, a.Stdout)
		}}
}

// vmConfigFlags are the settings as they are typed.
type vmConfigFlags struct {
	cpus                                *int
	memory, disk, idle, off, image, drv string
	shares, unshare                     []string
	restart, jsonOut                    bool
}

func (a *App) cmdVMConfig() *command.Command {
	var o vmConfigFlags
	var flags *command.FlagSet
	return &command.Command{Name: "config", Short: "Show or change the virtual machine's settings",
		Long:    "Show the virtual machine's settings, or change those that are given.\nWhat a running machine can take is applied at once; the rest at its next start, and the answer says so.",
		Example: "  servin vm config --cpus 4 --memory 8g\n  servin vm config --disk 200g\n  servin vm config --share /srv/code --share /data:ro\n  servin vm config --idle-time 10m",
		Flags: func(f *command.FlagSet) {
			flags = f
			f.OptInt(&o.cpus, "cpus", "", "Processors")
			f.String(&o.memory, "memory", "m", "Memory that it may use at most, as 4g; what it does not use stays the host's").Type = "bytes"
			f.String(&o.disk, "disk", "", "Size of its disk, as 100g: it grows, never shrinks, and takes what is used").Type = "bytes"
			f.Strings(&o.shares, "share", "", "Share a host folder under the same path, PATH or PATH:ro").Of("file")
			f.Strings(&o.unshare, "unshare", "", "Share a folder no longer").Of("file")
			f.String(&o.idle, "idle-time", "", "Sleep after nothing ran for so long, as 5m; 0 is never").Type = "duration"
			f.String(&o.off, "off-time", "", "Stop after it slept for so long, as 1h; 0 is never").Type = "duration"
			f.String(&o.image, "image", "", "Folder of the CloudOS image; \"\" is the installed one").Of("file")
			f.String(&o.drv, "driver", "", "What runs it: qemu, vfkit, hyperv, wsl2; \"\" is the platform's best")
			f.Bool(&o.restart, "restart", "", "Restart the machine if a setting needs that")
			f.Bool(&o.jsonOut, "json", "", "Print JSON")
		},
		Run: func(ctx context.Context, args []string) error {
			ch, any, err := o.change(flags)
			if err != nil {
				return err
			}
			v, err := a.vmd(ctx)
			if err != nil {
				return err
			}
			defer v.Close()
			if !any {
				st, err := v.Status(ctx)
				if err != nil {
					return err
				}
				if o.jsonOut {
					return format.JSONLines(a.out, []api.VMConfig{st.Config})
				}
				a.printVMConfig(st.Config)
				return nil
			}
			out, err := v.Change(ctx, ch)
			if err != nil {
				return err
			}
			if o.restart && len(out.Pending) > 0 {
				if err := v.Restart(ctx, a.showSteps("Restarting the virtual machine")); err != nil {
					return err
				}
				out.Applied, out.Pending = append(out.Applied, out.Pending...), nil
			}
			if o.jsonOut {
				return format.JSONLines(a.out, []api.VMChanged{out})
			}
			if len(out.Applied) > 0 {
				fmt.Fprintf(a.out, "Changed: %s\n", strings.Join(out.Applied, ", "))
			}
			if len(out.Pending) > 0 {
				fmt.Fprintf(a.out, "At the next start ('servin vm restart'): %s\n", strings.Join(out.Pending, ", "))
			}
			if len(out.Applied)+len(out.Pending) == 0 {
				fmt.Fprintln(a.out, "Nothing to change")
			}
			return nil
		}}
}

func (a *App) printVMConfig(c api.VMConfig) {
	rows := [][]string{{"cpus", fmt.Sprint(c.CPUs)}, {"memory", format.BinarySize(uint64(c.MemoryMiB) << 20)}, {"disk", format.BinarySize(uint64(c.DiskGiB) << 30)},
		{"idle-time", never(c.IdleSeconds)}, {"off-time", never(c.OffSeconds)}, {"image", orDefault(c.Image, "the installed one")}, {"driver", orDefault(c.Driver, "the platform's best")}}
	for _, s := range c.Shares {
		rows = append(rows, []string{"share", s.Path + readOnly(s.ReadOnly)})
	}
	format.Align(a.out, rows)
}

func never(seconds int) string {
	if seconds == 0 {
		return "never"
	}
	return (time.Duration(seconds) * time.Second).String()
}

func orDefault(s, def string) string {
	if s == "" {
		return def
	}
	return s
}

// change makes the request; any is false if nothing was given.
func (o *vmConfigFlags) change(f *command.FlagSet) (ch api.VMChange, any bool, err error) {
	ch.CPUs = o.cpus
	if o.memory != "" {
		if ch.MemoryMiB, err = inUnits(o.memory, 20, "memory"); err != nil {
			return ch, false, err
		}
	}
	if o.disk != "" {
		if ch.DiskGiB, err = inUnits(o.disk, 30, "disk"); err != nil {
			return ch, false, err
		}
	}
	if ch.IdleSeconds, err = seconds(o.idle, "idle-time"); err != nil {
		return ch, false, err
	}
	if ch.OffSeconds, err = seconds(o.off, "off-time"); err != nil {
		return ch, false, err
	}
	if f.Changed("image") {
		if o.image != "" {
			if o.image, err = filepath.Abs(o.image); err != nil {
				return ch, false, err
			}
		}
		ch.Image = &o.image
	}
	if f.Changed("driver") {
		ch.Driver = &o.drv
	}
	for _, s := range o.shares {
		path, ro := strings.CutSuffix(s, ":ro")
		if path, err = realPath(strings.TrimSuffix(path, ":rw")); err != nil {
			return ch, false, fmt.Errorf("cannot share %s: %w", s, err)
		}
		ch.Shares = append(ch.Shares, api.VMShare{Path: path, ReadOnly: ro})
	}
	for _, s := range o.unshare {
		if s, err = filepath.Abs(s); err != nil {
			return ch, false, err
		}
		ch.Unshare = append(ch.Unshare, s)
	}
	any = ch.CPUs != nil || ch.MemoryMiB != nil || ch.DiskGiB != nil || ch.IdleSeconds != nil || ch.OffSeconds != nil || ch.Image != nil || ch.Driver != nil ||
		len(ch.Shares)+len(ch.Unshare) > 0
	return ch, any, nil
}

// realPath is the folder under its own name: a link inside the machine would lead nowhere.
func realPath(p string) (string, error) {
	p, err := filepath.Abs(p)
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(p); err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(p)
}

// inUnits reads a size that has to be whole units of 1<<shift bytes.
func inUnits(s string, shift uint, what string) (*int, error) {
	n, err := units.RAMInBytes(s)
	if err != nil || n < 1<<shift || n%(1<<shift) != 0 || n>>shift > 1<<30 {
		return nil, usagef("%q is no size for the %s: write whole %s, as 4g", s, what, map[uint]string{20: "megabytes", 30: "gigabytes"}[shift])
	}
	v := int(n >> shift)
	return &v, nil
}

func seconds(s, what string) (*int, error) {
	if s == "" {
		return nil, nil
	}
	d, err := time.ParseDuration(s)
	if s == "0" || s == "never" {
		d, err = 0, nil
	}
	if err != nil || d < 0 || d%time.Second != 0 {
		return nil, usagef("%q is no %s: write 5m, 1h or 0 for never", s, what)
	}
	v := int(d / time.Second)
	return &v, nil
}
