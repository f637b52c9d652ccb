package vulndb

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Name of the file that holds a database.
const Name = "vulnerability.db"

// Keeper keeps databases in a directory of the user's: current/ is the one fetched
// last, others are those that were given as archives, by their digest.
type Keeper struct {
	Dir string
	// Unpack runs the stage.
	Unpack func(ctx context.Context, archive io.Reader, db io.Writer) error
}

// record lies beside a database and says what it was made of.
type record struct {
	Archive string    `json:"archive"`
	Built   time.Time `json:"built,omitzero"`
}

// ErrNone is that there is no database.
var ErrNone = fault.New(fault.NotFound, "there is no vulnerability database: fetch one with 'servin images scan --update-db', or give one with --db FILE")

// Find gives the database to use: what is given, or the one fetched last.
func (k *Keeper) Find(ctx context.Context, given string) (string, error) {
	if given == "" {
		file := filepath.Join(k.Dir, "current", Name)
		if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
			return "", ErrNone
		}
		return file, nil
	}
	st, err := os.Stat(given)
	if errors.Is(err, fs.ErrNotExist) {
		return "", fault.New(fault.NotFound, "there is no vulnerability database at %s", given)
	}
	if err != nil {
		return "", err
	}
	if st.IsDir() {
		given = filepath.Join(given, Name)
		if _, err := os.Stat(given); err != nil {
			return "", fault.New(fault.NotFound, "there is no vulnerability database at %s", given)
		}
		return given, nil
	}
	if filepath.Base(given) == Name {
		return given, nil
	}
	f, err := os.Open(given)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return "", err
	}
	sum := hex.EncodeToString(h.Sum(nil))
	file := filepath.Join(k.Dir, sum, Name)
	if _, err := os.Stat(file); err == nil {
		return file, nil
	}
	return file, k.put(ctx, sum, f, record{Archive: sum})
}

// Update fetches the newest database unless it is here; it tells whether it did.
func (k *Keeper) Update(ctx context.Context, base string) (*Latest, bool, error) {
	l, err := Ask(ctx, base)
	if err != nil {
		return nil, false, err
	}
	var have record
	if b, err := os.ReadFile(filepath.Join(k.Dir, "current", "record.json")); err == nil && json.Unmarshal(b, &have) == nil && have.Archive == l.Checksum {
		return l, false, nil
	}
	if err := os.MkdirAll(k.Dir, 0o755); err != nil {
		return nil, false, fmt.Errorf("cannot keep the database: %w", err)
	}
	f, err := os.CreateTemp(k.Dir, ".download-")
	if err != nil {
		return nil, false, err
	}
	defer f.Close()
	if err := os.Remove(f.Name()); err != nil {
		return nil, false, err
	}
	if err := l.Download(ctx, f); err != nil {
		return nil, false, err
	}
	return l, true, k.put(ctx, "current", f, record{l.Checksum, l.Built})
}

// put unpacks an archive and has it take its place whole.
func (k *Keeper) put(ctx context.Context, name string, archive io.Reader, r record) (err error) {
	if err := os.MkdirAll(k.Dir, 0o755); err != nil {
		return fmt.Errorf("cannot keep the database: %w", err)
	}
	tmp, err := os.MkdirTemp(k.Dir, ".new-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	// A stage is nobody when its parent is root, and must be able to read it.
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	if err := writeSynced(filepath.Join(tmp, Name), func(w io.Writer) error { return k.Unpack(ctx, archive, w) }); err != nil {
		return err
	}
	if err := writeSynced(filepath.Join(tmp, "record.json"), func(w io.Writer) error { return json.NewEncoder(w).Encode(r) }); err != nil {
		return err
	}
	dst := filepath.Join(k.Dir, name)
	out := tmp + ".old"
	if err := os.Rename(dst, out); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Rename(tmp, dst); err != nil {
		return err
	}
	return os.RemoveAll(out)
}

func writeSynced(file string, fill func(io.Writer) error) error {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	if err := fill(f); err != nil {
		return errors.Join(err, f.Close())
	}
	return errors.Join(f.Sync(), f.Close())
}
