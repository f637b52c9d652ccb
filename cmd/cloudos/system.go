package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/pflag"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/api/system"
	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli"
)

// machine is a command against a CloudOS machine.
type machine struct {
	flags  *pflag.FlagSet
	target cli.Target
}

func newMachine(name string) *machine {
	m := &machine{flags: pflag.NewFlagSet(name, pflag.ContinueOnError)}
	f := m.flags
	f.SetOutput(io.Discard)
	f.SortFlags = false
	f.StringVarP(&m.target.Host, "host", "H", "", "the machine's engine: unix:///path, tcp://host:port or ssh://user@host (default: as servin finds it)")
	f.StringVarP(&m.target.Context, "context", "c", "", "context of servin to use")
	f.BoolVar(&m.target.TLSVerify, "tlsverify", false, "use TLS and verify the machine")
	f.StringVar(&m.target.TLS.CA, "tlscacert", "", "file of the authority that the machine's certificate is from")
	f.StringVar(&m.target.TLS.Cert, "tlscert", "", "file of the certificate to show")
	f.StringVar(&m.target.TLS.Key, "tlskey", "", "file of its key")
	return m
}

// errHelp says that help was shown.
var errHelp = errors.New("help was shown")

// parse reads the arguments; at most so many are left.
func (m *machine) parse(usage string, args []string, least, most int) error {
	if err := m.flags.Parse(args); err != nil {
		if errors.Is(err, pflag.ErrHelp) {
			fmt.Printf("Usage: cloudos %s\n\n%s", usage, m.flags.FlagUsages())
			return errHelp
		}
		return err
	}
	if n := m.flags.NArg(); n < least || n > most {
		return fmt.Errorf("usage: cloudos %s", usage)
	}
	return nil
}

func (m *machine) connect() (*client.Client, error) {
	c, err := cli.ConnectTo(cli.Config{
		Args: os.Args, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
		Getenv: os.Getenv, LookupEnv: os.LookupEnv, Environ: os.Environ,
		Version: api.Version, Commit: func() string { return "unknown" },
	}, m.target)
	if err != nil {
		return nil, err
	}
	return c.Client, nil
}

// onMachine runs a command until it ends or is interrupted.
func onMachine(run func(ctx context.Context, args []string) error, args []string) (int, error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, args); err != nil && !errors.Is(err, errHelp) {
		return 1, err
	}
	return 0, nil
}

func upgradeCommand(ctx context.Context, args []string) error {
	m := newMachine("upgrade")
	o := client.UpgradeOptions{}
	noReboot := m.flags.Bool("no-reboot", false, "do not start the machine again: the new system starts when it is")
	wait := m.flags.Duration("wait", 10*time.Minute, "how long to wait for the new system to come up well; 0 does not wait")
	m.flags.BoolVar(&o.AllowDowngrade, "downgrade", false, "take an older system, too, or one whose age cannot be told")
	m.flags.BoolVar(&o.AllowUnsigned, "allow-unsigned", false, "take a release that no key signed which the machine trusts")
	quiet := m.flags.BoolP("quiet", "q", false, "show no progress")
	if err := m.parse("upgrade [OPTIONS] RELEASE|URL", args, 1, 1); err != nil {
		return err
	}
	c, err := m.connect()
	if err != nil {
		return err
	}
	defer c.Close()
	o.Reboot = !*noReboot
	bar := &progress{w: os.Stderr, quiet: *quiet, began: time.Now()}
	o.Progress = func(p system.Progress) { bar.show(p.Step, p.Bytes, p.Total) }
	var in io.Reader
	from := m.flags.Arg(0)
	if strings.HasPrefix(from, "http://") || strings.HasPrefix(from, "https://") {
		o.URL = from
	} else {
		f, err := os.Open(from)
		if err != nil {
			return fmt.Errorf("cannot read the release: %w", err)
		}
		defer f.Close()
		st, err := f.Stat()
		if err != nil {
			return err
		}
		if st.IsDir() {
			return fmt.Errorf("cannot upgrade from the folder %s: name the file cloudos.release in it", from)
		}
		in = &counted{r: f, total: st.Size(), bar: bar}
	}
	before, err := c.OSStatus(ctx)
	if err != nil {
		return err
	}
	change, err := c.OSUpgrade(ctx, o, in)
	bar.end()
	if err != nil {
		return err
	}
	return follow(ctx, c, before, change, o.Reboot, *wait)
}

func rollbackCommand(ctx context.Context, args []string) error {
	m := newMachine("rollback")
	noReboot := m.flags.Bool("no-reboot", false, "do not start the machine again: the other system starts when it is")
	wait := m.flags.Duration("wait", 10*time.Minute, "how long to wait for the other system to come up well; 0 does not wait")
	force := m.flags.Bool("force", false, "try a system that did not come up before")
	if err := m.parse("rollback [OPTIONS]", args, 0, 0); err != nil {
		return err
	}
	c, err := m.connect()
	if err != nil {
		return err
	}
	defer c.Close()
	before, err := c.OSStatus(ctx)
	if err != nil {
		return err
	}
	change, err := c.OSRollback(ctx, *force, !*noReboot)
	if err != nil {
		return err
	}
	return follow(ctx, c, before, change, !*noReboot, *wait)
}

func rebootCommand(ctx context.Context, args []string) error {
	m := newMachine("reboot")
	if err := m.parse("reboot [OPTIONS]", args, 0, 0); err != nil {
		return err
	}
	c, err := m.connect()
	if err != nil {
		return err
	}
	defer c.Close()
	return c.OSReboot(ctx)
}

// follow waits until it is known what became of a change.
func follow(ctx context.Context, c *client.Client, before system.Status, change *system.Change, rebooting bool, wait time.Duration) error {
	fmt.Printf("%s: system %s is in slot %s", change.Kind, change.To, change.Slot)
	if !rebooting {
		fmt.Println("; it starts when the machine starts again (cloudos reboot)")
		return nil
	}
	fmt.Println("; the machine starts it now")
	if wait <= 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	for {
		select {
		case <-ctx.Done():
			return fmt.Errorf("system %s has not come up well within %v; ask again with: cloudos status", change.To, wait)
		case <-time.After(2 * time.Second):
		}
		once, stop := context.WithTimeout(ctx, 20*time.Second)
		s, err := c.OSStatus(once)
		stop()
		if err != nil || s.Last == nil || !s.Last.Begun.Equal(change.Begun) {
			continue // it is on its way
		}
		switch s.Last.Outcome {
		case system.Succeeded:
			fmt.Printf("system %s came up well and is kept\n", s.Last.To)
			return nil
		case system.RolledBack:
			if running(s) == change.Slot {
				continue // it is about to go
			}
			return fmt.Errorf("system %s did not come up well (%s): %s runs again", s.Last.To, s.Last.Reason, before.Version)
		}
	}
}

func running(s system.Status) string {
	for _, slot := range s.Slots {
		if slot.Running {
			return slot.Name
		}
	}
	return ""
}

func statusCommand(ctx context.Context, args []string) error {
	m := newMachine("status")
	asJSON := m.flags.Bool("json", false, "as JSON")
	if err := m.parse("status [OPTIONS]", args, 0, 0); err != nil {
		return err
	}
	c, err := m.connect()
	if err != nil {
		return err
	}
	defer c.Close()
	s, err := c.OSStatus(ctx)
	if err != nil {
		return err
	}
	if *asJSON {
		e := json.NewEncoder(os.Stdout)
		e.SetIndent("", "  ")
		return e.Encode(s)
	}
	show(os.Stdout, s)
	return nil
}

// short of a key's id.
func short(id string) string { return id[:min(12, len(id))] }

func show(w io.Writer, s system.Status) {
	fmt.Fprintf(w, "%s: CloudOS %s (%s, kernel %s), %s\n", s.Hostname, s.Version, s.Arch, s.Kernel, s.State)
	if len(s.Slots) == 0 && s.Busy == "" {
		fmt.Fprintln(w, "It does not run from a disk with slots: it cannot be upgraded in place.")
	}
	for _, slot := range s.Slots {
		var what []string
		if slot.Running {
			what = append(what, "runs")
		}
		if slot.Good {
			what = append(what, "came up well")
		}
		if slot.Failed {
			what = append(what, "did not come up")
		}
		if slot.TriesLeft > 0 {
			what = append(what, fmt.Sprintf("is tried, %d starts left", slot.TriesLeft))
		}
		if slot.Name == s.Next {
			what = append(what, "starts next")
		}
		version := slot.Version
		if version == "" {
			version = "(no whole system)"
		}
		signed := "not signed by a trusted key"
		if slot.SignedBy != "" {
			signed = "signed by " + short(slot.SignedBy)
		}
		if slot.Version == "" {
			signed = ""
		}
		fmt.Fprintf(w, "  slot %s  %-24s %-28s %s\n", slot.Name, version, signed, strings.Join(what, ", "))
	}
	if s.Busy != "" {
		fmt.Fprintf(w, "  under way: %s\n", s.Busy)
	}
	if l := s.Last; l != nil {
		fmt.Fprintf(w, "  last %s, %s: %s to %s in slot %s: %s", l.Kind, l.Begun.Local().Format(time.DateTime), l.From, l.To, l.Slot, l.Outcome)
		if l.Reason != "" {
			fmt.Fprintf(w, " (%s)", l.Reason)
		}
		fmt.Fprintln(w)
	}
	if s.RecoveryKey {
		fmt.Fprintln(w, "  the data were encrypted: fetch their recovery key, which is there in this start alone (cloudos recovery-key)")
	}
	for _, p := range s.Problems {
		fmt.Fprintf(w, "  ! %s\n", p)
	}
}

// progress shows how far an upgrade is, on one line of a terminal.
type progress struct {
	w     *os.File
	quiet bool
	began time.Time
	last  time.Time
	shown bool
}

func (p *progress) show(step string, n, total int64) {
	if p.quiet || n < total && time.Since(p.last) < 100*time.Millisecond {
		return
	}
	if st, err := p.w.Stat(); err != nil || st.Mode()&os.ModeCharDevice == 0 {
		return
	}
	p.last, p.shown = time.Now(), true
	fmt.Fprintf(p.w, "\r\x1b[K%-7s %6.1f of %.1f MB", step, float64(n)/1e6, float64(total)/1e6)
}

func (p *progress) end() {
	if p.shown {
		fmt.Fprint(p.w, "\r\x1b[K")
	}
}

// counted shows what was sent of a file.
type counted struct {
	r     io.Reader
	n     int64
	total int64
	bar   *progress
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	c.n += int64(n)
	c.bar.show("write", c.n, c.total)
	return n, err
}
