package cli

import (
	"context"
	"fmt"
	"runtime"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/config"
	"github.com/cloudos-io/cloudos/internal/cli/format"
)

// Modes.
const (
	modeAuto   = "auto"
	modeNative = "native"
	modeVM     = "vm"
)

// effective is the mode that a configured one means on this platform.
func effective(mode string) string {
	switch {
	case mode == modeVM, mode == modeNative:
		return mode
	case runtime.GOOS == "linux":
		return modeNative
	}
	return modeVM // there is no engine for other kernels
}

// modeHost gives the default context its engine.
func (a *App) modeHost(c *config.Context) error {
	f, err := a.file()
	if err != nil {
		return err
	}
	if effective(f.Mode) == modeVM {
		c.Host, a.machine = "unix://"+a.place().Engine(), true
		return nil
	}
	c.Host = a.nativeHost()
	return nil
}

// nativeHost is the engine of mode native: SERVIN_NATIVE_HOST where it does not
// listen at its usual place.
func (a *App) nativeHost() string {
	if h := a.Getenv("SERVIN_NATIVE_HOST"); h != "" {
		return h
	}
	return client.DefaultHost()
}

// modeStatus is what mode status shows.
type modeStatus struct {
	Mode string // native, vm or remote
	// Configured is native, vm or auto.
	Configured string
	Engine     string
	Running    bool
	Version    string `json:",omitempty"`
	// Machine is the virtual machine's state.
	Machine string `json:",omitempty"`
}

func (a *App) mode() []*command.Command {
	jsonOut := false
	return []*command.Command{
		{Name: "status", Short: "Show where containers run: natively or in a virtual machine",
			Flags: func(f *command.FlagSet) { f.Bool(&jsonOut, "json", "", "Print JSON") },
			Run: func(ctx context.Context, args []string) error {
				st, err := a.modeNow(ctx)
				if err != nil {
					return err
				}
				if jsonOut {
					return format.JSONLines(a.out, []modeStatus{st})
				}
				state := "not running"
				switch {
				case st.Mode == modeVM && st.Machine != api.VMRunning:
					state = "the virtual machine is " + st.Machine
				case st.Running:
					state = "running, version " + st.Version
				}
				auto := ""
				if st.Configured == modeAuto {
					auto = " (auto)"
				}
				fmt.Fprintf(a.out, "Mode:    %s%s\nEngine:  %s (%s)\n", st.Mode, auto, st.Engine, state)
				return nil
			}},
		a.cmdModeSet("set", "native|vm|auto", 1),
		a.cmdModeSet("auto", "", 0),
	}
}

// modeNow finds out; it wakes no machine.
func (a *App) modeNow(ctx context.Context) (modeStatus, error) {
	f, err := a.file()
	if err != nil {
		return modeStatus{}, err
	}
	x, err := a.context()
	if err != nil {
		return modeStatus{}, err
	}
	st := modeStatus{Mode: "remote", Configured: f.Mode, Engine: x.Host}
	if st.Configured == "" {
		st.Configured = modeAuto
	}
	switch {
	case a.machine:
		st.Mode, st.Machine = modeVM, api.VMOff
		if v, err := client.NewVM(a.place().Control()); err == nil {
			defer v.Close()
			if s, err := v.Status(ctx); err == nil {
				st.Machine, st.Version = s.State, s.Version
				st.Running = s.State == api.VMRunning || s.State == api.VMSleeping
			}
		}
		return st, nil
	case runtime.GOOS == "linux" && len(x.Host) > 7 && x.Host[:7] == "unix://":
		st.Mode = modeNative
	}
	c, err := a.client()
	if err != nil {
		return st, err
	}
	v, err := c.ServerVersion(ctx)
	st.Running, st.Version = err == nil, v.Version
	return st, nil
}

func (a *App) cmdModeSet(name, args string, n int) *command.Command {
	short := "Choose where containers run"
	if n == 0 {
		short = "Let the platform decide where containers run"
	}
	noCarry, jsonOut := false, false
	return &command.Command{Name: name, Args: args, Short: short, Min: n, Max: n,
		Long: short + `.

Images, containers with what they wrote, volumes, networks, secrets and configs come
along: containers that run are stopped, copied and started at the other side. The side
that was left keeps everything (its containers stay stopped) until you remove it there. The
mode changes only when all is verified; a switch that was interrupted is run again.`,
		Flags: func(f *command.FlagSet) {
			f.Bool(&noCarry, "no-carry", "", "Switch alone, bring nothing")
			f.Bool(&jsonOut, "json", "", "Print JSON")
		},
		Run: func(ctx context.Context, args []string) error {
			mode := modeAuto
			if n == 1 {
				mode = args[0]
			}
			return a.setMode(ctx, mode, !noCarry, jsonOut)
		}}
}

// setMode keeps the choice once the engine that it means can be reached.
func (a *App) setMode(ctx context.Context, mode string, carry, jsonOut bool) error {
	if mode != modeAuto && mode != modeNative && mode != modeVM {
		return usagef("there is no mode %q: native, vm or auto", mode)
	}
	to := effective(mode)
	if to == modeNative && runtime.GOOS != "linux" {
		return fmt.Errorf("containers run natively on Linux alone: keep mode vm, or name an engine on a Linux host with --host or 'servin context create'")
	}
	f, err := a.file()
	if err != nil {
		return err
	}
	if to == modeVM {
		if err := a.startMachine(ctx); err != nil {
			return err
		}
	}
	// Elsewhere than on Linux there is no native side to bring anything from.
	if from := effective(f.Mode); carry && from != to && runtime.GOOS == "linux" {
		if err := a.carry(ctx, from, to, jsonOut); err != nil {
			return err
		}
	}
	f.Mode = mode
	if err := f.Save(); err != nil {
		return err
	}
	if jsonOut {
		return format.JSONLines(a.out, []map[string]string{{"Mode": to, "Configured": mode}})
	}
	if to == modeVM {
		fmt.Fprintf(a.out, "Containers run in the virtual machine now. Docker's clients: DOCKER_HOST=unix://%s\n", a.place().Engine())
	} else {
		fmt.Fprintf(a.out, "Containers run natively now, with the engine at %s\n", a.nativeHost())
	}
	return nil
}
