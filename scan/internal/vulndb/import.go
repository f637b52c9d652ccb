// Package vulndb brings databases of known vulnerabilities to where scans find them:
// from a file that is given, or fetched from where grype's are published. Archives
// are unpacked by a stage in the sandbox; fetching is the only thing in this program
// that uses the network, and only when asked to.
package vulndb

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"

	v6 "github.com/anchore/grype/grype/db/v6"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/scan/internal/match"
)

// Budget counts what is written.
type Budget interface{ Take(n int64) error }

// Unpack is the stage: it reads an archive (tar with gzip, zstd or xz), or a database
// as it is, makes the indexes that archives come without, checks that it can be
// opened, and writes the database.
func Unpack(r io.Reader, scratch string, b Budget, w io.Writer) error {
	dir := filepath.Join(scratch, "import")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	file := filepath.Join(dir, v6.VulnerabilityDBFileName)
	src, err := open(r)
	if err != nil {
		return err
	}
	if err := write(file, src, b); err != nil {
		return err
	}
	if err := v6.Hydrater()(dir); err != nil {
		return fault.As(fault.Invalid, fmt.Errorf("cannot make the indexes of the database: %w", err))
	}
	rdr, _, err := match.Open(file)
	if err != nil {
		return err
	}
	if err := rdr.Close(); err != nil {
		return err
	}
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(w, f)
	return err
}

var magics = []struct {
	magic []byte
	open  func(io.Reader) (io.Reader, error)
}{
	{[]byte{0x1f, 0x8b}, func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) }},
	{[]byte{0x28, 0xb5, 0x2f, 0xfd}, func(r io.Reader) (io.Reader, error) {
		return zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(256<<20))
	}},
	{[]byte("\xfd7zXZ\x00"), func(r io.Reader) (io.Reader, error) { return xz.NewReader(r) }},
}

// open finds the database in what r is.
func open(r io.Reader) (io.Reader, error) {
	br := bufio.NewReaderSize(r, 1<<16)
	head, err := br.Peek(16)
	if err != nil {
		return nil, fault.New(fault.Invalid, "cannot read the database: it is shorter than 16 bytes")
	}
	if bytes.HasPrefix(head, []byte("SQLite format 3\x00")) {
		return br, nil
	}
	var plain io.Reader = br
	for _, m := range magics {
		if bytes.HasPrefix(head, m.magic) {
			if plain, err = m.open(br); err != nil {
				return nil, fault.As(fault.Invalid, fmt.Errorf("cannot read the archive of the database: %w", err))
			}
			break
		}
	}
	tr := tar.NewReader(plain)
	for n := 0; n < 100; n++ {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fault.New(fault.Invalid, "cannot read the database: it is neither a SQLite file nor a tar archive of one: %w", err)
		}
		if h.Typeflag == tar.TypeReg && path.Base(path.Clean(h.Name)) == v6.VulnerabilityDBFileName {
			return tr, nil
		}
	}
	return nil, fault.New(fault.Invalid, "cannot read the database: the archive has no %s", v6.VulnerabilityDBFileName)
}

func write(file string, r io.Reader, b Budget) error {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			// Indexes add about as much again.
			if err := b.Take(2 * int64(n)); err != nil {
				return errors.Join(err, f.Close())
			}
			if _, err := f.Write(buf[:n]); err != nil {
				return errors.Join(err, f.Close())
			}
		}
		if errors.Is(err, io.EOF) {
			return f.Close()
		}
		if err != nil {
			return errors.Join(fault.As(fault.Invalid, fmt.Errorf("cannot unpack the database: %w", err)), f.Close())
		}
	}
}
