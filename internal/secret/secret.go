// Package secret keeps secrets and configs: small values by name, encrypted at
// rest, that containers get as files in memory.
//
// Every value is sealed with XChaCha20-Poly1305 under a *data key*; what it
// belongs to (kind, id, name, revision) is authenticated with it, so that one
// record cannot be passed off as another. The data keys lie in a *keyring*,
// wrapped under a *master key*: 32 random bytes in a file of their own, made at
// first use, or a passphrase (scrypt). With a passphrase the store is *locked*
// until somebody gives it. Changing the master key makes a new data key too; a
// kill in between leaves records of both, and a keyring that opens both.
//
// Only the engine imports this package, through the composition root.
package secret

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/chacha20poly1305"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/pattern"
)

// Limits, as Docker's.
const (
	maxSecret = 500 << 10
	maxConfig = 1000 << 10
	maxName   = 64
	maxRecord = 4 << 20
	maxItems  = 10000
)

var nameRule = pattern.New(`^[a-zA-Z0-9]+(?:[a-zA-Z0-9-_.]*[a-zA-Z0-9])?$`)

// Config of a store.
type Config struct {
	// Dir is made, 0700, with the first secret.
	Dir string
	// KeyFile is where the master key lies, Dir/key by default. It may be put
	// elsewhere, so that a copy of Dir alone is worth nothing.
	KeyFile string
	// PassphraseFile, if set, holds a passphrase that takes the place of the key file.
	PassphraseFile string
	Logger         *slog.Logger
}

// Store holds secrets and configs. Its methods are safe for concurrent use.
type Store struct {
	c   Config
	log *slog.Logger

	mu    sync.RWMutex
	items map[string]*record // by id
	ring  *keyring

	work int // scrypt's N for new passphrases

	// step is called before each change of the disk; tests stop there.
	step func() error
}

func (s *Store) next() error {
	if s.step == nil {
		return nil
	}
	return s.step()
}

// record is an item on disk.
type record struct {
	Version  int
	Kind     api.SecretKind
	ID       string
	Name     string
	Labels   map[string]string `json:",omitempty"`
	Created  time.Time
	Updated  time.Time
	Revision uint64
	Size     int
	// Key names the data key; Sealed is the nonce and the value.
	Key    string
	Sealed []byte
}

// bound is what is authenticated with the value.
func (r *record) bound() []byte {
	b, _ := json.Marshal([]any{r.Kind, r.ID, r.Name, r.Revision, r.Key})
	return b
}

func (r *record) item() api.Secret {
	return api.Secret{ID: r.ID, Kind: r.Kind, Name: r.Name, Labels: maps.Clone(r.Labels), CreatedAt: r.Created, UpdatedAt: r.Updated, Revision: r.Revision, Size: r.Size}
}

// New opens the store, if there is one. It reads all records but opens no value.
func New(c Config) (*Store, error) {
	if c.KeyFile == "" {
		c.KeyFile = filepath.Join(c.Dir, "key")
	}
	s := &Store{c: c, log: c.Logger, items: map[string]*record{}, work: scryptN}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	list, err := os.ReadDir(c.Dir)
	if errors.Is(err, os.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot read the secrets: %w", err)
	}
	for _, f := range list {
		if durable.IsTemporary(f.Name()) || strings.HasPrefix(f.Name(), ".tmp-") { // the latter by an older engine
			_ = os.Remove(filepath.Join(c.Dir, f.Name()))
			continue
		}
		id, ok := strings.CutSuffix(f.Name(), ".secret")
		if !ok {
			continue
		}
		r, err := s.read(id)
		if err != nil {
			// Kept as it is: it may be mended, and its name is better free than lost.
			s.log.Error("cannot read a secret's record; it is left out", "file", f.Name(), "cause", err)
			continue
		}
		s.items[r.ID] = r
	}
	ring, err := s.loadRing()
	if err != nil {
		return nil, err
	}
	s.ring = ring
	if ring != nil && c.PassphraseFile != "" && ring.KDF != nil {
		p, err := readSecretFile(c.PassphraseFile)
		if err == nil {
			err = s.Unlock(p)
		}
		if err != nil {
			return nil, fault.New(fault.Of(err), "cannot open the secrets with %s: %w", c.PassphraseFile, err)
		}
	}
	return s, nil
}

func (s *Store) read(id string) (*record, error) {
	b, err := readFile(filepath.Join(s.c.Dir, id+".secret"))
	if err != nil {
		return nil, err
	}
	r := new(record)
	if err := json.Unmarshal(b, r); err != nil {
		return nil, errors.New("it is not what was written") // no part of it in any text
	}
	if r.Version != 1 || r.ID != id || !validKind(r.Kind) || validName(r.Name) != nil {
		return nil, errors.New("it does not say what its name says")
	}
	return r, nil
}

func readFile(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxRecord+1))
	if err == nil && len(b) > maxRecord {
		err = errors.New("it is too large")
	}
	return b, err
}

// readSecretFile reads a key or passphrase that nobody else may read.
func readSecretFile(path string) (string, error) {
	st, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if st.Mode().Perm()&0o077 != 0 {
		return "", fault.New(fault.Invalid, "others may read %s: chmod 600 %s", path, path)
	}
	b, err := os.ReadFile(path)
	return strings.TrimRight(string(b), "\r\n"), err
}

func validKind(k api.SecretKind) bool { return k == api.KindSecret || k == api.KindConfig }

func validName(name string) error {
	if len(name) > maxName || !nameRule.MatchString(name) {
		return fault.New(fault.Invalid, "invalid name: only 64 [a-zA-Z0-9-_.] characters allowed, and the start and end character must be [a-zA-Z0-9]")
	}
	return nil
}

func checkData(k api.SecretKind, data []byte) error {
	limit := maxSecret
	if k == api.KindConfig {
		limit = maxConfig
	}
	if len(data) == 0 || len(data) > limit {
		return fault.New(fault.Invalid, "%s data must be larger than 0 and at most %d bytes", k, limit)
	}
	return nil
}

// Create stores a value under a new name.
func (s *Store) Create(k api.SecretKind, spec api.SecretSpec) (api.Secret, error) {
	if err := errors.Join(validName(spec.Name), checkData(k, spec.Data), checkLabels(spec.Labels)); err != nil {
		return api.Secret{}, fault.As(fault.Invalid, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.byName(k, spec.Name); old != nil {
		return api.Secret{}, fault.New(fault.Conflict, "%s %s already exists", k, spec.Name)
	}
	if len(s.items) >= maxItems {
		return api.Secret{}, fault.New(fault.Exhausted, "cannot keep more than %d secrets and configs", maxItems)
	}
	var id [16]byte
	_, _ = rand.Read(id[:])
	now := time.Now().UTC()
	r := &record{Version: 1, Kind: k, ID: hex.EncodeToString(id[:]), Name: spec.Name, Labels: maps.Clone(spec.Labels), Created: now, Updated: now, Revision: 1}
	if err := s.put(r, spec.Data); err != nil {
		return api.Secret{}, err
	}
	return r.item(), nil
}

func checkLabels(l map[string]string) error {
	n := 0
	for k, v := range l {
		n += len(k) + len(v)
	}
	if n > 64<<10 {
		return fault.New(fault.Invalid, "labels are longer than 64 KiB")
	}
	return nil
}

// put seals a value, writes the record and keeps it; s.mu is held.
func (s *Store) put(r *record, data []byte) error {
	if s.ring == nil {
		if err := s.newRing(); err != nil {
			return err
		}
	}
	if s.ring.locked() {
		return errLocked
	}
	if err := s.seal(r, data); err != nil {
		return err
	}
	b, err := json.Marshal(r)
	if err == nil {
		err = s.write(filepath.Join(s.c.Dir, r.ID+".secret"), b)
	}
	if err != nil {
		return fault.New(fault.Of(err), "cannot store the %s: %w", r.Kind, err)
	}
	s.items[r.ID] = r
	return nil
}

func (s *Store) seal(r *record, data []byte) error {
	key := s.ring.keys[s.ring.Current]
	aead, err := chacha20poly1305.NewX(key)
	if err != nil {
		return err
	}
	r.Key, r.Size = s.ring.Current, len(data)
	nonce := make([]byte, aead.NonceSize(), aead.NonceSize()+len(data)+aead.Overhead())
	_, _ = rand.Read(nonce)
	r.Sealed = aead.Seal(nonce, nonce, data, r.bound())
	return nil
}

// write replaces a file so that it is whole, and durable, at any time.
func (s *Store) write(path string, b []byte) error {
	dir := filepath.Dir(path)
	if err := s.next(); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return durable.WriteFile(path, b, 0o600, durable.Everything)
}

func (s *Store) byName(k api.SecretKind, name string) *record {
	for _, r := range s.items {
		if r.Kind == k && r.Name == name {
			return r
		}
	}
	return nil
}

// find looks an item up by id, name or a unique beginning of the id.
func (s *Store) find(k api.SecretKind, ref string) (*record, error) {
	if r := s.items[ref]; r != nil && r.Kind == k {
		return r, nil
	}
	if r := s.byName(k, ref); r != nil {
		return r, nil
	}
	var found *record
	for id, r := range s.items {
		if r.Kind == k && len(ref) >= 4 && strings.HasPrefix(id, ref) {
			if found != nil {
				return nil, fault.New(fault.Invalid, "%s %s is ambiguous", k, ref)
			}
			found = r
		}
	}
	if found == nil {
		return nil, fault.New(fault.NotFound, "%s %s not found", k, ref)
	}
	return found, nil
}

// List describes all items of a kind, by name.
func (s *Store) List(k api.SecretKind) []api.Secret {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := []api.Secret{}
	for _, r := range s.items {
		if r.Kind == k {
			out = append(out, r.item())
		}
	}
	slices.SortFunc(out, func(a, b api.Secret) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// Inspect describes an item.
func (s *Store) Inspect(k api.SecretKind, ref string) (api.Secret, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	r, err := s.find(k, ref)
	if err != nil {
		return api.Secret{}, err
	}
	return r.item(), nil
}

// Update stores a new value, new labels (not nil), or both, under the old name.
func (s *Store) Update(k api.SecretKind, ref string, spec api.SecretSpec) (api.Secret, error) {
	if err := checkLabels(spec.Labels); err != nil {
		return api.Secret{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old, err := s.find(k, ref)
	if err != nil {
		return api.Secret{}, err
	}
	data := spec.Data
	if data == nil {
		if data, err = s.open(old); err != nil {
			return api.Secret{}, err
		}
	} else if err := checkData(k, data); err != nil {
		return api.Secret{}, err
	}
	n := *old
	n.Updated = time.Now().UTC()
	n.Revision++
	if spec.Labels != nil {
		n.Labels = maps.Clone(spec.Labels)
	}
	if err := s.put(&n, data); err != nil {
		return api.Secret{}, err
	}
	return n.item(), nil
}

// Remove deletes an item.
func (s *Store) Remove(k api.SecretKind, ref string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, err := s.find(k, ref)
	if err != nil {
		return err
	}
	err = os.Remove(filepath.Join(s.c.Dir, r.ID+".secret"))
	if err == nil || errors.Is(err, os.ErrNotExist) {
		err = durable.SyncDir(s.c.Dir)
	}
	if err != nil {
		return fault.New(fault.Internal, "cannot remove %s %s: %w", k, r.Name, err)
	}
	delete(s.items, r.ID)
	return nil
}

// Reveal opens a value, for a container alone or, of a config, for who may use
// the engine.
func (s *Store) Reveal(k api.SecretKind, id string) ([]byte, api.Secret, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	r, err := s.find(k, id)
	if err != nil {
		return nil, api.Secret{}, err
	}
	b, err := s.open(r)
	return b, r.item(), err
}

func (s *Store) open(r *record) ([]byte, error) {
	if s.ring == nil || s.ring.locked() {
		return nil, errLocked
	}
	key := s.ring.keys[r.Key]
	if key == nil {
		return nil, fault.New(fault.Internal, "cannot open %s %s: its key is not in the keyring", r.Kind, r.Name)
	}
	aead, err := chacha20poly1305.NewX(key)
	if err != nil || len(r.Sealed) < aead.NonceSize() {
		return nil, fault.New(fault.Internal, "cannot open %s %s: its record is damaged", r.Kind, r.Name)
	}
	b, err := aead.Open(nil, r.Sealed[:aead.NonceSize()], r.Sealed[aead.NonceSize():], r.bound())
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot open %s %s: its record was changed by somebody else", r.Kind, r.Name)
	}
	return b, nil
}
