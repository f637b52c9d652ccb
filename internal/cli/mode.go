package cli

import (
	"context"
	"errors"
	"fmt"
	"runtime"

	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/format"
)

var errNoVM = errors.New("VM mode comes with the CloudOS image, which this build does not have yet; containers run natively here: see 'servin mode status'")

var errNeedsVM = errors.New("VM mode comes with the CloudOS image, which this build does not have yet; until then name an engine on a Linux host with --host or 'servin context create'")

func (a *App) vm() []*command.Command {
	one := func(name, short string) *command.Command {
		return &command.Command{Name: name, Short: short, Run: func(ctx context.Context, args []string) error {
			if runtime.GOOS == "linux" {
				return errNoVM
			}
			return errNeedsVM
		}}
	}
	return []*command.Command{one("status", "Show how the virtual machine is"), one("start", "Start the virtual machine"),
		one("stop", "Stop the virtual machine"), one("reset", "Bring the virtual machine back to a clean state")}
}

// modeStatus is what mode status shows.
type modeStatus struct {
	Mode    string // "native" or "remote"
	Engine  string
	Running bool
	Version string `json:",omitempty"`
}

func (a *App) mode() []*command.Command {
	jsonOut := false
	return []*command.Command{{Name: "status", Short: "Show where containers run: natively or in a virtual machine",
		Flags: func(f *command.FlagSet) { f.Bool(&jsonOut, "json", "", "Print JSON") },
		Run: func(ctx context.Context, args []string) error {
			x, err := a.context()
			if err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			st := modeStatus{Mode: "remote", Engine: x.Host}
			if runtime.GOOS == "linux" && len(x.Host) > 7 && x.Host[:7] == "unix://" {
				st.Mode = "native"
			}
			v, err := c.ServerVersion(ctx)
			st.Running, st.Version = err == nil, v.Version
			if jsonOut {
				return format.JSONLines(a.out, []modeStatus{st})
			}
			state := "not running"
			if st.Running {
				state = "running, version " + st.Version
			}
			fmt.Fprintf(a.out, "Mode:    %s\nEngine:  %s (%s)\n", st.Mode, st.Engine, state)
			return nil
		}},
		{Name: "set", Args: "native|vm", Short: "Choose where containers run", Min: 1, Max: 1, Hidden: true,
			Run: func(ctx context.Context, args []string) error {
				if args[0] == "native" && runtime.GOOS == "linux" {
					return nil
				}
				if runtime.GOOS == "linux" {
					return errNoVM
				}
				return errNeedsVM
			}}}
}
