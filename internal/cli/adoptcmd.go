package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/docker/go-units"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/adopt"
	"github.com/cloudos-io/cloudos/internal/cli/command"
)

// cmdAdopt is "servin system adopt".
func (a *App) cmdAdopt() *command.Command {
	var only []string
	var from string
	dry, replace, jsonOut := false, false, false
	return &command.Command{Name: "adopt", Args: "docker|podman", Short: "Bring images, volumes, networks and containers of another engine here", Min: 1, Max: 1,
		Long: `Bring what Docker or Podman has on this host to this engine: images, the content of
volumes, networks, and the definitions of containers. The other engine is only read,
and goes on as it was. Containers are created, not started.

What is here already is left alone, so an adoption that was interrupted can be run
again. Volumes are copied while the other engine's containers may write to them: stop
those first where that matters.`,
		Flags: func(f *command.FlagSet) {
			f.String(&from, "from", "", "The other engine's API: unix:///path, tcp://host:port (default its usual socket)")
			f.Strings(&only, "only", "", "Adopt only these: images, volumes, networks, containers")
			f.Bool(&dry, "dry-run", "n", "Show what would be done")
			f.Bool(&replace, "replace", "", "Move names of images that mean another image here")
			f.Bool(&jsonOut, "json", "", "Print each step as JSON, one a line")
		},
		Run: func(ctx context.Context, args []string) error {
			o := adopt.Options{Replace: replace}
			for _, w := range only {
				for _, k := range strings.Split(w, ",") {
					kind := adopt.Kind(strings.TrimSuffix(k, "s"))
					switch kind {
					case adopt.Images, adopt.Volumes, adopt.Networks, adopt.Containers:
						o.Kinds = append(o.Kinds, kind)
					default:
						return fmt.Errorf("cannot adopt %q: it is images, volumes, networks or containers", k)
					}
				}
			}
			src, done, err := a.otherEngine(ctx, args[0], from)
			if err != nil {
				return err
			}
			defer done()
			o.Local = strings.HasPrefix(src.Host(), "unix:")
			dst, err := a.client()
			if err != nil {
				return err
			}
			ours, err := adopt.Read(ctx, dst)
			if err != nil {
				return err
			}
			theirs, err := adopt.Read(ctx, src)
			if err != nil {
				return fmt.Errorf("cannot read what %s has: %w", args[0], err)
			}
			return a.adopt(ctx, &adopt.Adopter{From: src, To: dst, Warn: func(w string) { a.warn([]string{w}) }}, adopt.Decide(theirs, ours, o), args[0], dry, jsonOut)
		}}
}

// adopted is what --json prints of a step.
type adopted struct {
	adopt.Step
	Done  bool
	Error string `json:",omitempty"`
}

func (a *App) adopt(ctx context.Context, ad *adopt.Adopter, steps []adopt.Step, who string, dry, jsonOut bool) error {
	failed, done := 0, 0
	for i := range steps {
		s := &steps[i]
		var err error
		if !dry && s.Skip == "" {
			show := a.adoptProgress(s, jsonOut)
			ad.Progress = show
			err = ad.Do(ctx, s)
			show(-1)
			if ctx.Err() != nil {
				return fmt.Errorf("interrupted at %s %s; what was done stays, run it again for the rest", s.Kind, s.Name)
			}
		}
		switch {
		case err != nil:
			failed++
		case s.Skip == "":
			done++
		}
		if jsonOut {
			line := adopted{Step: *s, Done: err == nil && s.Skip == "" && !dry}
			if err != nil {
				line.Error = err.Error()
			}
			if err := json.NewEncoder(a.out).Encode(line); err != nil {
				return err
			}
			continue
		}
		name := s.Name
		if len(name) > 60 {
			name = name[:57] + "..."
		}
		what := "adopted"
		switch {
		case err != nil:
			what = "failed: " + err.Error()
		case s.Skip != "":
			what = "left: " + s.Skip
		case dry:
			what = "would be adopted"
		}
		fmt.Fprintf(a.out, "%-9s  %s  %s\n", s.Kind, name, what)
		for _, w := range s.Warnings {
			if s.Skip == "" {
				fmt.Fprintf(a.out, "           note: %s\n", w)
			}
		}
	}
	if !jsonOut {
		switch {
		case dry:
			fmt.Fprintf(a.out, "%d to adopt; nothing was done\n", done)
		case failed == 0 && done > 0:
			fmt.Fprintf(a.out, "%d adopted. Containers are not started: stop one with %s, then 'servin start' it here\n", done, who)
		case failed == 0:
			fmt.Fprintln(a.out, "nothing to adopt")
		}
	}
	if failed > 0 {
		return fmt.Errorf("%d of %d could not be adopted", failed, failed+done)
	}
	return nil
}

// adoptProgress shows on a terminal how far a long step is; -1 clears the line.
func (a *App) adoptProgress(s *adopt.Step, quiet bool) func(int64) {
	if quiet || !a.errIsTerminal() {
		return func(int64) {}
	}
	var last time.Time
	shown := false
	return func(n int64) {
		switch {
		case n < 0:
			if shown {
				fmt.Fprint(a.Stderr, "\r\033[K")
			}
		case time.Since(last) > 100*time.Millisecond:
			last, shown = time.Now(), true
			fmt.Fprintf(a.Stderr, "\r\033[K%-9s  %.50s  %s", s.Kind, s.Name, units.HumanSize(float64(n)))
		}
	}
}

// otherEngine connects to the engine that is adopted. Podman without a service is
// asked to serve for as long as it takes.
func (a *App) otherEngine(ctx context.Context, who, host string) (*client.Client, func(), error) {
	none := func() {}
	if host != "" {
		c, err := client.Negotiate(ctx, client.Config{Host: host})
		return c, none, err
	}
	var sockets []string
	run := os.Getenv("XDG_RUNTIME_DIR")
	switch who {
	case "docker":
		sockets = []string{"/var/run/docker.sock"}
		if run != "" {
			sockets = append(sockets, filepath.Join(run, "docker.sock"))
		}
	case "podman":
		if os.Geteuid() == 0 {
			sockets = []string{"/run/podman/podman.sock"}
		} else if run != "" {
			sockets = []string{filepath.Join(run, "podman", "podman.sock")}
		}
	default:
		return nil, none, fmt.Errorf("cannot adopt %q: it is docker or podman", who)
	}
	for _, s := range sockets {
		if k, err := net.DialTimeout("unix", s, 2*time.Second); err == nil {
			k.Close()
			c, err := client.Negotiate(ctx, client.Config{Host: "unix://" + s})
			return c, none, err
		}
	}
	if who == "docker" {
		return nil, none, fmt.Errorf("cannot reach Docker at %s: is it running? --from names another address", strings.Join(sockets, " or "))
	}
	return podmanService(ctx)
}

// podmanService runs "podman system service" until the function is called.
func podmanService(ctx context.Context) (*client.Client, func(), error) {
	none := func() {}
	bin, err := exec.LookPath("podman")
	if err != nil {
		return nil, none, errors.New("cannot reach Podman: its service does not run and there is no podman command; --from names an address")
	}
	dir, err := os.MkdirTemp("", "servin-adopt")
	if err != nil {
		return nil, none, err
	}
	host := "unix://" + filepath.Join(dir, "podman.sock")
	cmd := exec.Command(bin, "system", "service", "--time=0", host)
	var said strings.Builder
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		return nil, none, errors.Join(err, os.RemoveAll(dir))
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	stop := func() {
		_ = cmd.Process.Signal(os.Interrupt)
		select {
		case <-ended:
		case <-time.After(5 * time.Second):
			_ = cmd.Process.Kill()
			<-ended
		}
		_ = os.RemoveAll(dir)
	}
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); {
		select {
		case err := <-ended:
			ended <- err
			stop()
			return nil, none, fmt.Errorf("cannot serve Podman's API: %w: %s", err, strings.TrimSpace(said.String()))
		case <-ctx.Done():
			stop()
			return nil, none, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
		if c, err := client.Negotiate(ctx, client.Config{Host: host}); err == nil {
			return c, stop, nil
		}
	}
	stop()
	return nil, none, errors.New("cannot reach Podman: the service that was started does not answer")
}
