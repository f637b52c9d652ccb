package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/cli/command"
)

func (a *App) cmdPolicy() *command.Command {
	return &command.Command{Name: "policy", Short: "What may run", Sub: func() []*command.Command {
		return []*command.Command{a.cmdPolicyShow(), a.cmdPolicyCheck(), a.cmdPolicyTest(), a.cmdPolicyReload()}
	}}
}

func (a *App) cmdPolicyShow() *command.Command {
	asJSON := false
	return &command.Command{Name: "show", Short: "Show the policy in force", Max: 0,
		Flags: func(f *command.FlagSet) { f.Bool(&asJSON, "json", "", "Print JSON") },
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			p, err := c.Policy(ctx)
			if err != nil {
				return err
			}
			if asJSON {
				return json.NewEncoder(a.out).Encode(p)
			}
			if p.Path == "" {
				fmt.Fprintln(a.Stderr, "No policy: everything is allowed.")
				return nil
			}
			fmt.Fprintf(a.Stderr, "%s, loaded %s, %d rules\n", p.Path, p.Loaded.Local().Format(time.DateTime), len(p.Rules))
			if p.Problem != "" {
				fmt.Fprintln(a.Stderr, "WARNING: a later version is not in force:", p.Problem)
			}
			fmt.Fprint(a.out, p.Document)
			return nil
		}}
}

func (a *App) cmdPolicyCheck() *command.Command {
	return &command.Command{Name: "check", Args: "FILE", Short: "Tell whether a document is a policy that the engine would take", Min: 1, Max: 1, Complete: []string{"file"},
		Run: func(ctx context.Context, args []string) error {
			f, err := os.Open(args[0])
			if err != nil {
				return fmt.Errorf("cannot read the policy: %w", err)
			}
			defer f.Close()
			b, err := io.ReadAll(io.LimitReader(f, 2<<20))
			if err != nil {
				return fmt.Errorf("cannot read the policy: %w", err)
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			v, err := c.PolicyCheck(ctx, b)
			if err != nil {
				return err
			}
			fmt.Fprintf(a.out, "%s: %d rules\n", args[0], v.Rules)
			return nil
		}}
}

func (a *App) cmdPolicyTest() *command.Command {
	var o createFlags
	return &command.Command{Name: "test", Args: "[OPTIONS OF RUN] IMAGE [COMMAND...]", Short: "Tell what the policy says to a container, without making it", Min: 1, Max: -1, Complete: []string{"image"},
		Inner: true,
		Flags: o.declare,
		Run: func(ctx context.Context, args []string) error {
			s, err := a.build(&o, args)
			if err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			v, err := c.PolicyTest(ctx, &api.RunRequest{Name: o.name, Platform: o.platform, Config: s.config, HostConfig: s.host, Networking: s.net, Extra: s.extra})
			if err != nil {
				return err
			}
			if v.Allowed {
				fmt.Fprintln(a.out, "allowed")
				return nil
			}
			for _, x := range v.Violations {
				fmt.Fprintln(a.out, x)
			}
			return exitWith(exitFailure, fmt.Errorf("the policy refuses this container"))
		}}
}

func (a *App) cmdPolicyReload() *command.Command {
	return &command.Command{Name: "reload", Short: "Make the engine read its policy again", Max: 0,
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return c.PolicyReload(ctx)
		}}
}

func (a *App) cmdAudit() *command.Command {
	since, head := "", ""
	verify, follow, asJSON := false, false, false
	return &command.Command{Name: "audit", Short: "Show who called the engine for what, or verify that record", Max: 0,
		Example: "servin system audit --since 1h --follow",
		Flags: func(f *command.FlagSet) {
			f.String(&since, "since", "", "From this time on: a time, a date, or a duration before now")
			f.Bool(&follow, "follow", "f", "Go on as calls come in")
			f.Bool(&asJSON, "json", "", "Print the records as they are kept")
			f.Bool(&verify, "verify", "", "Check the whole chain of records, here and in the engine")
			f.String(&head, "head", "", "With --verify: SEQ:HASH noted earlier, which must still be there")
		},
		Run: func(ctx context.Context, args []string) error {
			if verify {
				return a.verifyAudit(ctx, head, asJSON)
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			begun := map[uint64]api.AuditRecord{}
			return c.Audit(ctx, since, follow, func(line []byte) error {
				if asJSON {
					_, err := a.out.Write(line)
					return firstErr(err, a.flushIf(follow))
				}
				r, err := api.OpenAudit(line)
				if err != nil {
					fmt.Fprintf(a.out, "!! a record was changed: %v\n", err)
					return a.flushIf(follow)
				}
				a.showRecord(r, begun)
				return a.flushIf(follow)
			})
		}}
}

func firstErr(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func (a *App) flushIf(on bool) error {
	if on {
		return a.out.Flush()
	}
	return nil
}

// showRecord prints one line a call, when it has ended; what did not end is shown
// where it began by the next start of the engine.
func (a *App) showRecord(r api.AuditRecord, begun map[uint64]api.AuditRecord) {
	at := func(t time.Time) string { return t.Local().Format("2006-01-02 15:04:05.000") }
	switch r.Event {
	case "begin":
		if len(begun) < 10000 {
			begun[r.Seq] = r
		}
	case "end":
		b, ok := begun[r.Call]
		delete(begun, r.Call)
		if !ok {
			b = r
		}
		fmt.Fprintf(a.out, "%s  %-20s %-3d %s", at(b.Time), whoText(b.Who), r.Status, b.Method)
		if b.Object != "" {
			fmt.Fprintf(a.out, " %s", strconv.Quote(b.Object))
		}
		all := maps.Clone(b.Attrs)
		if all == nil {
			all = map[string]string{}
		}
		maps.Copy(all, r.Attrs)
		for _, k := range slices.Sorted(maps.Keys(all)) {
			fmt.Fprintf(a.out, " %s=%s", k, quoted(all[k]))
		}
		if r.Error != "" {
			fmt.Fprintf(a.out, " error=%s", strconv.Quote(r.Error))
		}
		fmt.Fprintf(a.out, " (%.1f ms)\n", r.Millis)
	default:
		for _, seq := range slices.Sorted(maps.Keys(begun)) {
			b := begun[seq]
			fmt.Fprintf(a.out, "%s  %-20s ?   %s %s (no outcome was recorded)\n", at(b.Time), whoText(b.Who), b.Method, strconv.Quote(b.Object))
			delete(begun, seq)
		}
		fmt.Fprintf(a.out, "%s  -- %s", at(r.Time), r.Event)
		for _, k := range slices.Sorted(maps.Keys(r.Attrs)) {
			fmt.Fprintf(a.out, " %s=%s", k, quoted(r.Attrs[k]))
		}
		fmt.Fprintln(a.out)
	}
}

// quoted keeps what others wrote from acting on the terminal.
func quoted(s string) string {
	if q := strconv.Quote(s); len(q) != len(s)+2 || strings.ContainsAny(s, " =") {
		return q
	}
	return s
}

func whoText(w *api.AuditWho) string {
	switch {
	case w == nil:
		return "-"
	case w.Subject != "":
		return quoted(w.Subject)
	case w.UID != nil:
		return "uid=" + strconv.FormatUint(uint64(*w.UID), 10) + " " + quoted(w.Program)
	}
	return w.Address
}

// verifyAudit checks the chain twice: the engine its files, and this command line
// what the engine shows.
func (a *App) verifyAudit(ctx context.Context, head string, asJSON bool) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	var v api.AuditVerifier
	if head != "" {
		seq, hash, ok := strings.Cut(head, ":")
		n, err := strconv.ParseUint(seq, 10, 64)
		if !ok || err != nil || len(hash) != 64 {
			return usagef("--head is SEQ:HASH, as an earlier --verify printed it")
		}
		v.Expect(api.AuditHead{Seq: n, Hash: hash})
	}
	theirs, err := c.AuditVerify(ctx)
	if err != nil {
		return err
	}
	if theirs.Head != "" {
		v.Expect(api.AuditHead{Seq: theirs.Last, Hash: theirs.Head})
	}
	if err := c.Audit(ctx, "", false, func(line []byte) error { v.Line(line); return nil }); err != nil {
		return err
	}
	rep := v.End()
	for _, p := range theirs.Problems {
		if !slices.Contains(rep.Problems, p) {
			rep.Problems = append(rep.Problems, p)
		}
	}
	if asJSON {
		if err := json.NewEncoder(a.out).Encode(rep); err != nil {
			return err
		}
	} else {
		for _, p := range rep.Problems {
			fmt.Fprintln(a.out, p)
		}
	}
	if n := len(rep.Problems); n > 0 {
		return exitWith(exitFailure, fmt.Errorf("the audit log was tampered with or damaged: %d problems", n))
	}
	if !asJSON {
		fmt.Fprintf(a.out, "%d records, %d to %d, are as they were written\nhead %d:%s\n", rep.Records, rep.First, rep.Last, rep.Last, rep.Head)
	}
	return nil
}
