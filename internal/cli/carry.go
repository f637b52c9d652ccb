package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/adopt"
	"github.com/cloudos-io/cloudos/internal/cli/config"
)

// journal is what a switch of modes that is under way has to know if it is
// interrupted: which containers it stopped.
type journal struct {
	From, To string
	Stopped  []string
}

func (a *App) journalFile() string { return filepath.Join(a.dir(), "switch.json") }

func (a *App) readJournal(from, to string) journal {
	var j journal
	b, err := os.ReadFile(a.journalFile())
	if err != nil || json.Unmarshal(b, &j) != nil || j.From != from || j.To != to {
		return journal{From: from, To: to}
	}
	return j
}

func (j *journal) write(a *App) error {
	b, err := json.Marshal(j)
	if err != nil {
		return err
	}
	return config.WriteFile(a.journalFile(), b, 0o600)
}

// engineOf gives a client for the engine of a mode.
func (a *App) engineOf(ctx context.Context, mode string) (*client.Client, error) {
	host := a.nativeHost()
	if mode == modeVM {
		v, err := a.vmd(ctx)
		if err != nil {
			return nil, err
		}
		err = v.Start(ctx, a.showSteps("Starting the virtual machine"))
		v.Close()
		if err != nil {
			return nil, err
		}
		host = "unix://" + a.place().Engine()
	}
	return client.New(client.Config{Host: host, UserAgent: "servin/" + a.Version})
}

// carry brings everything from the engine of one mode to that of another. The source
// keeps all of it: its containers are stopped, those that ran are started at the
// other side at the end. An interrupted switch is begun again and goes on.
func (a *App) carry(ctx context.Context, from, to string, jsonOut bool) error {
	src, err := a.engineOf(ctx, from)
	if err != nil {
		return err
	}
	defer src.Close()
	if err := src.Ping(ctx); err != nil {
		var ce *client.ConnectError
		if errors.As(err, &ce) && from == modeNative {
			return a.nothingNative(err)
		}
		return err
	}
	dst, err := a.engineOf(ctx, to)
	if err != nil {
		return err
	}
	defer dst.Close()
	if err := dst.Ping(ctx); err != nil {
		return fmt.Errorf("cannot reach the engine to switch to: %w", err)
	}
	j := a.readJournal(from, to)
	list, err := src.ContainerList(ctx, client.ContainerListOptions{})
	if err != nil {
		return err
	}
	for _, c := range list {
		if n := containerName(c); !slices.Contains(j.Stopped, n) {
			j.Stopped = append(j.Stopped, n)
		}
	}
	if err := j.write(a); err != nil {
		return err
	}
	for _, c := range list {
		if err := src.ContainerStop(ctx, c.ID, client.StopOptions{}); err != nil && !client.IsNotFound(err) {
			return fmt.Errorf("cannot stop %s before it is carried over: %w", containerName(c), err)
		}
	}
	if err := a.carryAll(ctx, src, dst, from, jsonOut); err != nil {
		// What ran goes on where it was.
		for _, n := range j.Stopped {
			if serr := src.ContainerStart(context.WithoutCancel(ctx), n, ""); serr != nil && !client.IsNotFound(serr) {
				a.warn([]string{"container " + n + " was stopped and cannot be started again: " + serr.Error()})
			}
		}
		return err
	}
	var failed []string
	for _, n := range j.Stopped {
		if err := dst.ContainerStart(ctx, n, ""); err != nil && !client.IsNotFound(err) { // a --rm container is gone
			failed = append(failed, n+": "+err.Error())
		}
	}
	if len(failed) > 0 {
		a.warn([]string{"carried over, but not started: " + strings.Join(failed, "; ")})
	}
	if err := os.Remove(a.journalFile()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// carryAll does every step, then looks again: nothing may be left to do.
func (a *App) carryAll(ctx context.Context, src, dst *client.Client, from string, jsonOut bool) error {
	steps, err := adopt.DecideCarry(ctx, src, dst)
	if err != nil {
		return err
	}
	ad := &adopt.Adopter{From: src, To: dst, Archives: true, Layers: true, Warn: func(w string) { a.warn([]string{w}) }}
	failed := 0
	for i := range steps {
		s := &steps[i]
		if s.Skip != "" {
			continue
		}
		show := a.adoptProgress(s, jsonOut)
		ad.Progress = show
		err := ad.Do(ctx, s)
		show(-1)
		if ctx.Err() != nil {
			return fmt.Errorf("interrupted at %s %s: what was done stays, run it again for the rest", s.Kind, s.Name)
		}
		name := s.Name
		if len(name) > 60 {
			name = name[:57] + "..."
		}
		if err != nil {
			failed++
			fmt.Fprintf(a.Stderr, "[%d/%d] %-9s  %s  failed: %v\n", i+1, len(steps), s.Kind, name, err)
			continue
		}
		if !jsonOut {
			fmt.Fprintf(a.Stderr, "[%d/%d] %-9s  %s\n", i+1, len(steps), s.Kind, name)
		}
		a.warn(s.Warnings)
	}
	if failed > 0 {
		return fmt.Errorf("%d of %d could not be carried over; the mode stays %s. What was carried over stays: mend the rest and run it again, or switch without carrying by --no-carry", failed, len(steps), from)
	}
	if steps, err = adopt.DecideCarry(ctx, src, dst); err != nil {
		return fmt.Errorf("cannot verify what was carried over: %w", err)
	}
	for _, s := range steps {
		if s.Skip == "" {
			return fmt.Errorf("cannot verify %s %s at the other side; the mode stays %s", s.Kind, s.Name, from)
		}
	}
	return nil
}

// nothingNative tells an engine that does not run from one that was never there.
func (a *App) nothingNative(err error) error {
	for _, root := range []string{"/var/lib/servin", filepath.Join(config.Home(a.Getenv), ".local", "share", "servin", "meta")} {
		if _, serr := os.Stat(root); serr == nil {
			return fmt.Errorf("cannot carry over what the native engine has, since it does not run: %w; start it, or switch without carrying by --no-carry", err)
		}
	}
	return nil
}

func containerName(c container.Summary) string {
	if len(c.Names) > 0 {
		return strings.TrimPrefix(c.Names[0], "/")
	}
	return c.ID
}
