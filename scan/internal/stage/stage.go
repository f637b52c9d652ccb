// Package stage is what runs inside the sandbox: each stage reads standard input,
// works, and writes standard output.
package stage

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/cloudos-io/cloudos/scan/internal/inventory"
	"github.com/cloudos-io/cloudos/scan/internal/layout"
	"github.com/cloudos-io/cloudos/scan/internal/match"
	"github.com/cloudos-io/cloudos/scan/internal/sandbox"
	"github.com/cloudos-io/cloudos/scan/internal/signature"
	"github.com/cloudos-io/cloudos/scan/internal/vulndb"
)

// The stages.
const (
	Catalog = "catalog"
	Convert = "convert"
	Match   = "match"
	Unpack  = "unpack"
	Verify  = "verify"
)

const maxRequest = 256 << 20

// Run is the whole life of a stage.
func Run(ctx context.Context, name, version string, args []string) error {
	in, err := sandbox.Enter()
	if err != nil {
		return err
	}
	out := bufio.NewWriterSize(os.Stdout, 1<<16)
	f := flag.NewFlagSet(name, flag.ContinueOnError)
	image := f.String("name", "", "")
	format := f.String("format", "", "")
	failOn := f.String("fail-on", "", "")
	fixed := f.Bool("only-fixed", false, "")
	if err := f.Parse(args); err != nil {
		return err
	}
	switch name {
	case Catalog:
		img, e := layout.Read(os.Stdin, filepath.Join(in.Scratch, "image"), in)
		if e != nil {
			return e
		}
		err = inventory.Take(ctx, img, inventory.Options{Name: *image, Version: version}, out)
	case Convert:
		var r *os.File
		if r, err = spool(in); err == nil {
			err = inventory.Convert(r, *format, out)
		}
	case Match:
		var r *os.File
		if r, err = spool(in); err != nil {
			return err
		}
		var severe bool
		severe, err = match.Report(ctx, r, match.Options{
			Database: in.Database, Format: *format, FailOn: *failOn, FixedOnly: *fixed, Version: version, Now: time.Now(),
		}, out)
		if severe && err == nil {
			err = sandbox.ErrYes
		}
	case Unpack:
		err = vulndb.Unpack(os.Stdin, in.Scratch, in, out)
	case Verify:
		var req signature.Request
		if err := json.NewDecoder(io.LimitReader(os.Stdin, maxRequest)).Decode(&req); err != nil {
			return fmt.Errorf("cannot read the request: %w", err)
		}
		err = json.NewEncoder(out).Encode(signature.Verify(req))
	default:
		return fmt.Errorf("there is no stage %q", name)
	}
	if err != nil && !errors.Is(err, sandbox.ErrYes) {
		return err
	}
	return errors.Join(out.Flush(), err)
}

// spool makes a file of standard input.
func spool(in *sandbox.Inside) (*os.File, error) {
	f, err := os.Create(filepath.Join(in.Scratch, "input"))
	if err != nil {
		return nil, err
	}
	n, err := io.Copy(f, io.LimitReader(os.Stdin, maxRequest+1))
	if err != nil {
		return nil, err
	}
	if n > maxRequest {
		return nil, fmt.Errorf("the inventory is larger than %d bytes", maxRequest)
	}
	_, err = f.Seek(0, io.SeekStart)
	return f, errors.Join(err, in.Take(n))
}
