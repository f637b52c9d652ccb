package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/config"
)

// place is where this user's virtual machine keeps things.
func (a *App) place() api.VMPlace { return api.FindVMPlace(a.Getenv, config.Home(a.Getenv)) }

// vmd gives a client for servin-vmd, which is started if it does not run.
func (a *App) vmd(ctx context.Context) (*client.VM, error) {
	place := a.place()
	v, err := client.NewVM(place.Control())
	if err != nil {
		return nil, err
	}
	if _, err = v.Status(ctx); err == nil {
		return v, nil
	}
	var ce *client.ConnectError
	if !errors.As(err, &ce) {
		return nil, err
	}
	return v, a.spawnVMD(ctx, v, place)
}

// spawnVMD starts servin-vmd apart from us and waits until it serves.
func (a *App) spawnVMD(ctx context.Context, v *client.VM, place api.VMPlace) error {
	program, err := findVMD()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(place.State, 0o700); err != nil {
		return fmt.Errorf("cannot make the virtual machine's folder: %w", err)
	}
	said := filepath.Join(place.State, "vmd.err")
	f, err := os.OpenFile(said, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("cannot start servin-vmd: %w", err)
	}
	defer f.Close()
	cmd := exec.Command(program)
	cmd.Stderr = f
	cmd.Dir = place.State
	cmd.SysProcAttr = apart()
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("cannot start servin-vmd: %w", err)
	}
	ended := make(chan struct{})
	go func() { cmd.Wait(); close(ended) }()
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		// Another command may have started one at the same time: it serves us, too.
		if _, err := v.Status(ctx); err == nil {
			return nil
		}
		select {
		case <-ended:
			time.Sleep(50 * time.Millisecond)
			if _, err := v.Status(ctx); err == nil {
				return nil
			}
			b, _ := os.ReadFile(said)
			if b = bytes.TrimSpace(b); len(b) > 0 {
				return fmt.Errorf("cannot start servin-vmd: %s", bytes.TrimPrefix(b, []byte("servin-vmd: ")))
			}
			return errors.New("cannot start servin-vmd: it ended at once")
		case <-ctx.Done():
			return errors.New("servin-vmd does not answer: see vmd.log in " + place.State)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func findVMD() (string, error) {
	name := "servin-vmd"
	if runtime.GOOS == "windows" {
		name += ".exe"
	}
	if self, err := os.Executable(); err == nil {
		if p, err := filepath.EvalSymlinks(self); err == nil {
			self = p
		}
		if p := filepath.Join(filepath.Dir(self), name); isFile(p) {
			return p, nil
		}
	}
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	}
	return "", errors.New("cannot find the program servin-vmd, which runs the virtual machine: install it beside servin")
}

func isFile(p string) bool {
	fi, err := os.Stat(p)
	return err == nil && fi.Mode().IsRegular()
}

// machineUp makes sure that somebody serves the machine's engine. On a terminal
// a start is shown; elsewhere the first request starts the machine.
func (a *App) machineUp() error {
	ctx := context.Background()
	v, err := a.vmd(ctx)
	if err != nil {
		return err
	}
	defer v.Close()
	if !a.errIsTerminal() {
		return nil
	}
	st, err := v.Status(ctx)
	if err != nil || st.State == api.VMRunning || st.State == api.VMSleeping {
		return err
	}
	return v.Start(ctx, a.showSteps("Starting the virtual machine"))
}

// startMachine starts it and shows how.
func (a *App) startMachine(ctx context.Context) error {
	v, err := a.vmd(ctx)
	if err != nil {
		return err
	}
	defer v.Close()
	return v.Start(ctx, a.showSteps("Starting the virtual machine"))
}

// showSteps prints what is done: one line that changes on a terminal, else one a step.
func (a *App) showSteps(title string) func(api.VMProgress) {
	last := ""
	return func(p api.VMProgress) {
		if p.Done {
			if last != "" && a.errIsTerminal() {
				fmt.Fprintf(a.Stderr, "\r\x1b[K")
			}
			return
		}
		if p.Step == "" || p.Step == last {
			return
		}
		last = p.Step
		if !a.errIsTerminal() {
			fmt.Fprintf(a.Stderr, "%s: %s\n", title, p.Step)
			return
		}
		left := ""
		if p.Expected > 0 {
			left = fmt.Sprintf(" (about %.0f s in all)", p.Expected)
		}
		fmt.Fprintf(a.Stderr, "\r\x1b[K%s: %s%s ", title, p.Step, left)
	}
}
