// Package store keeps the engine's records in bbolt databases, one opened
// exclusively by one daemon. Changes are committed in groups: whoever waits for
// a change shares one transaction, and one sync, with everybody who asked in
// the meantime. Records are opaque bytes here; the engine owns their meaning.
//
// Vocabulary: a *bucket* holds records of one kind by key; a *durable* database
// syncs before it acknowledges, an ephemeral one (under the run root) never
// does and is thrown away when the host was rebooted. A record that its owner
// cannot decode is *quarantined*: set aside in a bucket of its own and reported.
package store

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/cloudos-io/cloudos/internal/fault"
)

const quarantine = "quarantine"

// Config of a database.
type Config struct {
	// Path of the file; its directory must exist.
	Path string
	// Buckets that are to exist.
	Buckets []string
	// Ephemeral: never sync, and start empty when BootID differs from the one
	// the file was made under.
	Ephemeral bool
	BootID    string
	// LockTimeout is how long to wait for another daemon to let go, 2 s by default.
	LockTimeout time.Duration
}

// DB is an open database. Its methods are safe for concurrent use.
type DB struct {
	bolt  *bolt.DB
	queue chan *change
	done  chan struct{}
	// SetAside is the path a damaged database was moved to when opening, or "".
	SetAside string
}

// Open opens or makes the database. fault.Conflict: another daemon has it.
func Open(c Config) (*DB, error) {
	if c.LockTimeout == 0 {
		c.LockTimeout = 2 * time.Second
	}
	d := &DB{queue: make(chan *change, 256), done: make(chan struct{})}
	if c.Ephemeral {
		if err := dropStale(c); err != nil {
			return nil, err
		}
	}
	err := d.open(c)
	if errors.Is(err, berrors.ErrTimeout) {
		return nil, fault.New(fault.Conflict, "cannot open %s: another daemon uses this root; stop it or give another --root and --run-root", c.Path)
	}
	if errors.Is(err, errDamaged) {
		// What can be read of it is for a person to look at; going on without is
		// better than no engine at all.
		d.SetAside = c.Path + time.Now().UTC().Format(".damaged-20060102T150405.000")
		if rerr := os.Rename(c.Path, d.SetAside); rerr != nil {
			return nil, fmt.Errorf("cannot open %s: %w; cannot set it aside: %w", c.Path, err, rerr)
		}
		err = d.open(c)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot open %s: %w", c.Path, err)
	}
	go d.commit()
	return d, nil
}

var errDamaged = errors.New("database is damaged")

func (d *DB) open(c Config) (err error) {
	// bbolt panics when pages refer to nowhere, and faults beyond the end of file.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			if d.bolt != nil {
				_ = d.bolt.Close()
				d.bolt = nil
			}
			err = fmt.Errorf("%w: %v", errDamaged, p)
		}
	}()
	o := *bolt.DefaultOptions
	o.Timeout = c.LockTimeout
	o.FreelistType = bolt.FreelistMapType
	// Without a stored freelist bbolt walks every page when opening, in a goroutine
	// whose panic on a damaged page cannot be caught. Only an ephemeral database,
	// which a reboot throws away, may go without.
	o.NoFreelistSync = c.Ephemeral
	o.NoSync, o.NoGrowSync = c.Ephemeral, c.Ephemeral
	db, err := bolt.Open(c.Path, 0o600, &o)
	if err != nil {
		if errors.Is(err, berrors.ErrInvalid) || errors.Is(err, berrors.ErrChecksum) || errors.Is(err, berrors.ErrVersionMismatch) {
			return fmt.Errorf("%w: %w", errDamaged, err)
		}
		if st, serr := os.Stat(c.Path); serr == nil && st.Size() > 0 && st.Size() < int64(2*os.Getpagesize()) && !errors.Is(err, berrors.ErrTimeout) {
			return fmt.Errorf("%w: %w", errDamaged, err) // cut off within its first pages
		}
		return err
	}
	d.bolt = db
	err = db.View(func(tx *bolt.Tx) error {
		for _, b := range append([]string{quarantine}, c.Buckets...) {
			if tx.Bucket([]byte(b)) == nil {
				return berrors.ErrBucketNotFound
			}
		}
		return nil
	})
	if errors.Is(err, berrors.ErrBucketNotFound) {
		err = db.Update(func(tx *bolt.Tx) error {
			for _, b := range append([]string{quarantine}, c.Buckets...) {
				if _, err := tx.CreateBucketIfNotExists([]byte(b)); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err != nil {
		_ = db.Close()
		d.bolt = nil
	}
	return err
}

// dropStale removes an ephemeral database of an earlier boot: unsynced pages
// may have been lost with the power.
func dropStale(c Config) error {
	mark := c.Path + ".boot"
	if b, err := os.ReadFile(mark); err == nil && string(b) == c.BootID {
		return nil
	}
	if err := os.Remove(c.Path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("cannot remove the records of an earlier boot: %w", err)
	}
	if err := os.WriteFile(mark, []byte(c.BootID), 0o600); err != nil {
		return fmt.Errorf("cannot mark %s: %w", filepath.Base(c.Path), err)
	}
	return nil
}

type op struct {
	bucket, key string
	value       []byte // nil deletes
}

type change struct {
	ops  []op
	err  error
	done chan struct{}
}

// Pending is a change on its way to the disk. Changes take effect in the order
// in which they were asked for.
type Pending struct{ c *change }

// Wait returns once the change is committed, or could not be. It cannot be
// called off: the change may have happened already.
func (p Pending) Wait() error {
	if p.c == nil {
		return nil
	}
	<-p.c.done
	return p.c.err
}

// Put stores value, which must not be changed afterwards.
func (d *DB) Put(bucket, key string, value []byte) Pending {
	return d.enqueue(op{bucket, key, value})
}

// Delete removes a record; one that is not there is no error.
func (d *DB) Delete(bucket, key string) Pending {
	return d.enqueue(op{bucket: bucket, key: key})
}

func (d *DB) enqueue(ops ...op) Pending {
	c := &change{ops: ops, done: make(chan struct{})}
	select {
	case <-d.done: // closed: fails at once instead of waiting for nobody
		c.err = fault.New(fault.Unavailable, "cannot store: the database is closed")
		close(c.done)
		return Pending{c}
	default:
	}
	defer func() {
		if recover() != nil { // closed just now
			c.err = fault.New(fault.Unavailable, "cannot store: the database is closed")
			close(c.done)
		}
	}()
	d.queue <- c
	return Pending{c}
}

// commit is the only writer.
func (d *DB) commit() {
	defer close(d.done)
	var group []*change
	for first := range d.queue {
		group = append(group[:0], first)
	drain:
		for len(group) < 1024 {
			select {
			case c, ok := <-d.queue:
				if !ok {
					break drain
				}
				group = append(group, c)
			default:
				break drain
			}
		}
		err := d.bolt.Update(func(tx *bolt.Tx) error {
			for _, c := range group {
				for _, o := range c.ops {
					b := tx.Bucket([]byte(o.bucket))
					if b == nil {
						return fmt.Errorf("no bucket %q", o.bucket)
					}
					var err error
					if o.value == nil {
						err = b.Delete([]byte(o.key))
					} else {
						err = b.Put([]byte(o.key), o.value)
					}
					if err != nil {
						return err
					}
				}
			}
			return nil
		})
		if err != nil {
			err = fmt.Errorf("cannot store: %w", err)
		}
		for i, c := range group {
			c.err = err
			close(c.done)
			group[i] = nil
		}
	}
}

// Bad is a record that could not be used.
type Bad struct {
	Bucket, Key string
	Err         error
}

// Load calls each for every record of the bucket; the value may be kept. A
// record for which it returns an error is quarantined and returned as bad.
func (d *DB) Load(bucket string, each func(key string, value []byte) error) (bad []Bad, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("cannot read bucket %s: %w: %v", bucket, errDamaged, p)
		}
	}()
	var ops []op
	err = d.bolt.View(func(tx *bolt.Tx) error {
		b := tx.Bucket([]byte(bucket))
		if b == nil {
			return fmt.Errorf("cannot read bucket %s: it does not exist", bucket)
		}
		return b.ForEach(func(k, v []byte) error {
			key, value := string(k), bytes.Clone(v)
			if uerr := each(key, value); uerr != nil {
				bad = append(bad, Bad{bucket, key, uerr})
				ops = append(ops, op{quarantine, strings.Join([]string{bucket, key}, "/"), value}, op{bucket: bucket, key: key})
			}
			return nil
		})
	})
	if err != nil || len(ops) == 0 {
		return bad, err
	}
	if err := d.enqueue(ops...).Wait(); err != nil {
		return bad, fmt.Errorf("cannot quarantine %d records: %w", len(bad), err)
	}
	return bad, nil
}

// Close commits what was asked for and closes the file. No method may be called
// meanwhile but those that find it closed.
func (d *DB) Close() error {
	close(d.queue)
	<-d.done
	return d.bolt.Close()
}
