// Package command is the command line of servin-scan. It is a tool for programs:
// 'servin images sbom', 'scan' and 'verify' run it, and so does the engine where a
// policy asks for signatures. Each command reads standard input, has a stage do the
// work in the sandbox, and writes standard output.
package command

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/docker/go-units"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/scan/internal/sandbox"
	"github.com/cloudos-io/cloudos/scan/internal/stage"
	"github.com/cloudos-io/cloudos/scan/internal/vulndb"
)

// Exit codes. Others are those of the usual failures.
const (
	exitFailed     = 1
	exitSevere     = 2 // something as severe as asked was found
	exitNoDatabase = 3
	exitUsage      = 125
)

// ErrSevere is that something as severe as --fail-on says was found.
var ErrSevere = errors.New("")

type usage struct{ error }

// ExitCode of an error of Run.
func ExitCode(err error) int {
	var u usage
	switch {
	case err == nil:
		return 0
	case errors.Is(err, ErrSevere):
		return exitSevere
	case errors.Is(err, vulndb.ErrNone):
		return exitNoDatabase
	case errors.As(err, &u):
		return exitUsage
	}
	return exitFailed
}

const help = `servin-scan is run by 'servin images sbom', 'scan' and 'verify', and by the engine.

  servin-scan catalog [--name NAME]               an OCI layout as a tar -> inventory
  servin-scan convert --format FORMAT             inventory -> SBOM
  servin-scan match [--db FILE] [--format FORMAT] inventory -> report
  servin-scan verify                              request -> verdict, JSON both
  servin-scan update-db [--url URL]               fetch the newest database
  servin-scan import-db FILE                      take a database from a file`

// Run runs a command.
func Run(ctx context.Context, version string, args []string, in io.Reader, out, complaints io.Writer) error {
	if len(args) == 0 {
		fmt.Fprintln(complaints, help)
		return usage{errors.New("a command is needed")}
	}
	f := flag.NewFlagSet(args[0], flag.ContinueOnError)
	f.SetOutput(complaints)
	limits := sandbox.Limits{}
	memory := f.String("memory", "1g", "memory that a stage may take")
	disk := f.String("max-size", "20g", "bytes that the content may unpack to")
	f.DurationVar(&limits.Time, "timeout", 15*time.Minute, "time that a stage may take")
	name := f.String("name", "", "name of the image")
	format := f.String("format", "table", "form of the output")
	db := f.String("db", "", "database: a file, an archive, a directory")
	url := f.String("url", vulndb.Published, "where databases are published")
	failOn := f.String("fail-on", "", "end with 2 if anything is as severe")
	fixed := f.Bool("only-fixed", false, "leave out what has no fix")
	if err := f.Parse(args[1:]); err != nil {
		return usage{err}
	}
	var err error
	if limits.Memory, err = size("memory", *memory, 64<<20, 1<<40); err != nil {
		return err
	}
	if limits.Disk, err = size("max-size", *disk, 1<<20, 1<<45); err != nil {
		return err
	}
	run := func(j sandbox.Job) error {
		j.Limits = limits
		return sandbox.Run(ctx, j)
	}
	k, err := keeper(run)
	if err != nil {
		return err
	}
	switch cmd := args[0]; cmd {
	case "catalog":
		return wrap("read the image", run(sandbox.Job{Stage: stage.Catalog, Args: []string{"-name", *name}, In: in, Out: out}))
	case "convert":
		return wrap("write the SBOM", run(sandbox.Job{Stage: stage.Convert, Args: []string{"-format", *format}, In: in, Out: out}))
	case "verify":
		return wrap("verify signatures", run(sandbox.Job{Stage: stage.Verify, In: in, Out: out}))
	case "match":
		file, err := k.Find(ctx, *db)
		if err != nil {
			return err
		}
		if err := readable(file); err != nil {
			return err
		}
		j := sandbox.Job{Stage: stage.Match, Args: []string{"-format", *format, "-fail-on", *failOn}, In: in, Out: out, Database: file}
		if *fixed {
			j.Args = append(j.Args, "-only-fixed")
		}
		err = run(j)
		if errors.Is(err, sandbox.ErrYes) {
			return ErrSevere
		}
		return wrap("scan the image", err)
	case "update-db":
		l, fresh, err := k.Update(ctx, *url)
		if err != nil {
			return err
		}
		if !fresh {
			_, err = fmt.Fprintf(out, "The database of %s is the newest\n", l.Built.UTC().Format(time.DateOnly))
			return err
		}
		_, err = fmt.Fprintf(out, "Fetched the database of %s\n", l.Built.UTC().Format(time.DateOnly))
		return err
	case "import-db":
		if f.NArg() != 1 {
			return usage{errors.New("import-db takes a file")}
		}
		file, err := k.Find(ctx, f.Arg(0))
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(out, file)
		return err
	default:
		fmt.Fprintln(complaints, help)
		return usage{fmt.Errorf("there is no command %q", cmd)}
	}
}

func wrap(what string, err error) error {
	if err == nil {
		return nil
	}
	return fault.As(fault.Of(err), fmt.Errorf("cannot %s: %w", what, err))
}

func size(flag, s string, least, most int64) (int64, error) {
	n, err := units.RAMInBytes(s)
	if err != nil || n < least || n > most {
		return 0, usage{fmt.Errorf("--%s %q is no amount from %s to %s", flag, s, units.BytesSize(float64(least)), units.BytesSize(float64(most)))}
	}
	return n, nil
}

// keeper keeps databases in SERVIN_SCAN_CACHE, or where the user's caches are.
func keeper(run func(sandbox.Job) error) (*vulndb.Keeper, error) {
	dir := os.Getenv("SERVIN_SCAN_CACHE")
	if dir == "" {
		base, err := os.UserCacheDir()
		if err != nil {
			base = os.TempDir()
		}
		dir = filepath.Join(base, "servin")
	}
	return &vulndb.Keeper{Dir: filepath.Join(dir, "vulnerabilities"), Unpack: func(_ context.Context, archive io.Reader, db io.Writer) error {
		return wrap("import the database", run(sandbox.Job{Stage: stage.Unpack, In: archive, Out: db}))
	}}, nil
}

// readable makes sure that a stage, which is nobody when we are root, can read the
// database.
func readable(file string) error {
	st, err := os.Stat(file)
	if err != nil {
		return err
	}
	if os.Geteuid() == 0 && st.Mode().Perm()&0o004 == 0 {
		return fault.New(fault.Forbidden, "cannot use the database %s: the scanner runs as nobody, who may not read it; chmod o+r %s", file, file)
	}
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	head := make([]byte, 16)
	if _, err := io.ReadFull(f, head); err != nil || !bytes.HasPrefix(head, []byte("SQLite format 3\x00")) {
		return fault.New(fault.Invalid, "cannot use the database %s: it is no SQLite file", file)
	}
	return nil
}
