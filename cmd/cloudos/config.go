package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/cloudos-io/cloudos/client"
)

// maxDocument is more than a machine takes, in bytes.
const maxDocument = 2 << 20

// configCommand shows a machine's configuration, or with "set FILE" gives it another.
func configCommand(ctx context.Context, args []string) error {
	m := newMachine("config")
	next := m.flags.Bool("next", false, "show the document that is kept for the next start")
	reboot := m.flags.Bool("reboot", false, "with set: start the machine again, so that the document is used")
	const usage = "config [OPTIONS] [set FILE]"
	if err := m.parse(usage, args, 0, 2); err != nil {
		return err
	}
	set := m.flags.NArg() == 2 && m.flags.Arg(0) == "set"
	if m.flags.NArg() > 0 && !set || set && *next || !set && *reboot {
		return errors.New("usage: cloudos " + usage)
	}
	var document []byte
	if set {
		var err error
		if document, err = readDocument(m.flags.Arg(1)); err != nil {
			return err
		}
	}
	c, err := m.connect()
	if err != nil {
		return err
	}
	defer c.Close()
	if !set {
		have, err := c.OSConfig(ctx)
		if err != nil {
			return err
		}
		switch {
		case *next && have.Next == "":
			fmt.Fprintln(os.Stderr, "The next start uses the document that is in use.")
			fallthrough
		case !*next:
			fmt.Fprintf(os.Stderr, "In use, from: %s\n", have.Source)
			fmt.Print(ended(have.Document))
			if have.Next != "" {
				fmt.Fprintln(os.Stderr, "Another document is kept for the next start: cloudos config --next")
			}
		default:
			fmt.Print(ended(have.Next))
		}
		return nil
	}
	if err := c.SetOSConfig(ctx, document, *reboot); err != nil {
		return err
	}
	if *reboot {
		fmt.Println("kept; the machine starts again with it now")
		return nil
	}
	fmt.Println("kept; it is used from the next start (cloudos reboot)")
	have, err := c.OSConfig(ctx)
	if err == nil && have.Source == "cmdline" {
		fmt.Fprintln(os.Stderr, "The kernel's command line has a document, which comes first: what was kept is not used as long as it does.")
	}
	return err
}

func ended(s string) string { return strings.TrimRight(s, "\n") + "\n" }

// readDocument reads a file, or what comes in where it is "-".
func readDocument(file string) ([]byte, error) {
	in := os.Stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, fmt.Errorf("cannot read the document: %w", err)
		}
		defer f.Close()
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, maxDocument))
	if err != nil {
		return nil, fmt.Errorf("cannot read the document: %w", err)
	}
	return b, nil
}

// recoveryCommand fetches the recovery key of encrypted data.
func recoveryCommand(ctx context.Context, args []string) error {
	m := newMachine("recovery-key")
	if err := m.parse("recovery-key [OPTIONS]", args, 0, 0); err != nil {
		return err
	}
	c, err := m.connect()
	if err != nil {
		return err
	}
	defer c.Close()
	key, err := c.OSRecoveryKey(ctx)
	if err != nil {
		return err
	}
	fmt.Println(key)
	fmt.Fprintln(os.Stderr, "Keep it: it is not shown again.")
	return nil
}

// logsCommand shows lines of one of a machine's logs.
func logsCommand(ctx context.Context, args []string) error {
	m := newMachine("logs")
	var o client.OSLogOptions
	m.flags.StringVar(&o.Source, "source", "init", "init (the first process), kernel or engine")
	m.flags.IntVarP(&o.Tail, "tail", "n", 100, "how many of the last lines")
	m.flags.BoolVarP(&o.Follow, "follow", "f", false, "show what comes, too, until interrupted")
	if err := m.parse("logs [OPTIONS]", args, 0, 0); err != nil {
		return err
	}
	c, err := m.connect()
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.OSLog(ctx, o, os.Stdout); err != nil && ctx.Err() == nil {
		return err
	}
	return nil
}
