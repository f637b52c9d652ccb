// Package luks reads and writes the headers of encrypted disks: LUKS2, as of the
// "LUKS2 On-Disk Format Specification" 1.1, so that cryptsetup can open what the machine
// made. A *Header* has key slots, each of which opens the same volume key, and tokens, which
// say where the key of a slot comes from. Data are aes-xts-plain64 with 512 bits. The
// kernel (package dm) encrypts; here is only what leads to the key. The first process imports it.
package luks

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"strconv"

	"github.com/cloudos-io/cloudos/internal/fault"
)

const (
	magic1     = "LUKS\xba\xbe"
	magic2     = "SKUL\xba\xbe"
	binarySize = 4096
	headerSize = 16384 // of one copy
	jsonSize   = headerSize - binarySize

	// DataOffset is where the data begin, in bytes; SectorSize what is encrypted as one.
	DataOffset = 16 << 20
	SectorSize = 4096

	// KeySize is that of the volume's key, in bytes.
	KeySize  = 64
	slotArea = (KeySize*stripes + 4095) &^ 4095
	maxSlots = 8
)

// Disk is where a header is.
type Disk interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
}

// Header is a disk's.
type Header struct {
	UUID  string
	label string
	seq   uint64
	meta  metadata
}

// The document in the header: its fields are the specification's.
type (
	metadata struct {
		KeySlots map[string]*keySlot        `json:"keyslots"`
		Tokens   map[string]json.RawMessage `json:"tokens"`
		Segments map[string]*segment        `json:"segments"`
		Digests  map[string]*digest         `json:"digests"`
		Config   settings                   `json:"config"`
	}
	keySlot struct {
		Type    string `json:"type"`
		KeySize int    `json:"key_size"`
		AF      struct {
			Type    string `json:"type"`
			Stripes int    `json:"stripes"`
			Hash    string `json:"hash"`
		} `json:"af"`
		Area struct {
			Type       string `json:"type"`
			Offset     number `json:"offset"`
			Size       number `json:"size"`
			Encryption string `json:"encryption"`
			KeySize    int    `json:"key_size"`
		} `json:"area"`
		KDF kdf `json:"kdf"`
	}
	kdf struct {
		Type       string `json:"type"`
		Hash       string `json:"hash,omitempty"`
		Iterations int    `json:"iterations,omitempty"`
		Time       int    `json:"time,omitempty"`
		Memory     int    `json:"memory,omitempty"`
		CPUs       int    `json:"cpus,omitempty"`
		Salt       []byte `json:"salt"`
	}
	segment struct {
		Type       string `json:"type"`
		Offset     number `json:"offset"`
		Size       string `json:"size"`
		IVTweak    number `json:"iv_tweak"`
		Encryption string `json:"encryption"`
		SectorSize int    `json:"sector_size"`
	}
	digest struct {
		Type       string   `json:"type"`
		KeySlots   []string `json:"keyslots"`
		Segments   []string `json:"segments"`
		Hash       string   `json:"hash"`
		Iterations int      `json:"iterations"`
		Salt       []byte   `json:"salt"`
		Digest     []byte   `json:"digest"`
	}
	settings struct {
		JSONSize     number          `json:"json_size"`
		KeySlotsSize number          `json:"keyslots_size"`
		Flags        []string        `json:"flags,omitempty"`
		Requirements json.RawMessage `json:"requirements,omitempty"`
	}
)

// number is a decimal in a string: 64 bits are more than a number in JSON may have.
type number uint64

func (n number) MarshalText() ([]byte, error) { return strconv.AppendUint(nil, uint64(n), 10), nil }

func (n *number) UnmarshalText(b []byte) error {
	v, err := strconv.ParseUint(string(b), 10, 62)
	*n = number(v)
	return err
}

// Is reports whether a disk's first bytes are a header's.
func Is(b []byte) bool {
	return bytes.HasPrefix(b, []byte(magic1)) || len(b) >= headerSize+6 && string(b[headerSize:headerSize+6]) == magic2
}

// New returns the header of a new volume with a key; it has no slot yet.
func New(label string, key []byte) (*Header, error) {
	if len(key) != KeySize || len(label) > 47 {
		return nil, errors.New("cannot make a header: the key or the label has a wrong length")
	}
	id := make([]byte, 16)
	salt := make([]byte, 32)
	rand.Read(id)
	rand.Read(salt)
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80
	h := &Header{UUID: fmt.Sprintf("%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:]), label: label}
	d := &digest{Type: "pbkdf2", KeySlots: []string{}, Segments: []string{"0"}, Hash: "sha256", Iterations: strongIterations, Salt: salt}
	sum, err := d.of(key)
	if err != nil {
		return nil, err
	}
	d.Digest = sum
	h.meta = metadata{
		KeySlots: map[string]*keySlot{}, Tokens: map[string]json.RawMessage{}, Digests: map[string]*digest{"0": d},
		Segments: map[string]*segment{"0": {Type: "crypt", Offset: DataOffset, Size: "dynamic", Encryption: cipherName, SectorSize: SectorSize}},
		Config:   settings{JSONSize: jsonSize, KeySlotsSize: DataOffset - 2*headerSize},
	}
	return h, nil
}

// Read reads a disk's header: the newer of its two whole copies.
func Read(disk io.ReaderAt) (*Header, error) {
	var best *Header
	var failed error
	for i, magic := range []string{magic1, magic2} {
		b := make([]byte, headerSize)
		if _, err := disk.ReadAt(b, int64(i*headerSize)); err != nil {
			return nil, fmt.Errorf("cannot read the header: %w", err)
		}
		h, err := decode(b, magic, uint64(i*headerSize))
		if err != nil {
			failed = err
			continue
		}
		if best == nil || h.seq > best.seq {
			best = h
		}
	}
	if best == nil {
		return nil, fault.New(fault.Invalid, "cannot read the header of the encrypted disk: %w", failed)
	}
	return best, nil
}

// Places in the binary part.
const (
	atVersion, atSize, atSeq, atLabel, atAlg, atSalt, atUUID, atOffset, atSum = 6, 8, 16, 24, 72, 104, 168, 256, 448
)

func decode(b []byte, magic string, offset uint64) (*Header, error) {
	be := binary.BigEndian
	switch {
	case string(b[:6]) != magic:
		return nil, errors.New("it is not there")
	case be.Uint16(b[atVersion:]) != 2:
		return nil, errors.New("its version is not 2")
	case be.Uint64(b[atSize:]) != headerSize || be.Uint64(b[atOffset:]) != offset:
		return nil, errors.New("it has another size or place than this system writes")
	case text(b[atAlg:atAlg+32]) != "sha256":
		return nil, errors.New("its check sum is of another kind")
	}
	sum := bytes.Clone(b[atSum : atSum+64])
	clear(b[atSum : atSum+64])
	if want := sha256.Sum256(b); !bytes.Equal(want[:], sum[:32]) {
		return nil, errors.New("its check sum is wrong")
	}
	return decodeUnchecked(b)
}

// decodeUnchecked decodes what has the right sum.
func decodeUnchecked(b []byte) (*Header, error) {
	h := &Header{UUID: text(b[atUUID : atUUID+40]), label: text(b[atLabel : atLabel+48]), seq: binary.BigEndian.Uint64(b[atSeq:])}
	doc := bytes.TrimRight(b[binarySize:], "\x00")
	if err := json.Unmarshal(doc, &h.meta); err != nil {
		return nil, err
	}
	return h, h.check()
}

func text(b []byte) string {
	s, _, _ := bytes.Cut(b, []byte{0})
	return string(s)
}

// check refuses what this system does not write.
func (h *Header) check() error {
	m := &h.meta
	s, d := m.Segments["0"], m.Digests["0"]
	switch {
	case len(m.Config.Requirements) > 0 && !bytes.Equal(bytes.TrimSpace(m.Config.Requirements), []byte("{}")):
		return errors.New("it requires what is not known here")
	case len(m.Segments) != 1 || s == nil || s.Type != "crypt" || s.Encryption != cipherName || s.Size != "dynamic" || s.IVTweak != 0:
		return errors.New("its segment is of another kind")
	case s.SectorSize != 512 && s.SectorSize != 4096 || s.Offset < 2*headerSize || s.Offset%4096 != 0 || s.Offset > 1<<30:
		return errors.New("its data are at a wrong place")
	case len(m.Digests) != 1 || d == nil || d.Type != "pbkdf2" || d.Hash != "sha256" || d.Iterations < 1 || d.Iterations > maxIterations || len(d.Digest) != 32:
		return errors.New("its digest is of another kind")
	case len(m.KeySlots) > 32:
		return errors.New("it has too many key slots")
	}
	for _, k := range m.KeySlots {
		if k == nil {
			return errors.New("a key slot is empty")
		}
	}
	if m.Tokens == nil {
		m.Tokens = map[string]json.RawMessage{}
	}
	if m.KeySlots == nil {
		m.KeySlots = map[string]*keySlot{}
	}
	return nil
}

// Data is where the data begin, and the size of their sectors, in bytes.
func (h *Header) Data() (offset, sector uint64) {
	s := h.meta.Segments["0"]
	return uint64(s.Offset), uint64(s.SectorSize)
}

// Write writes both copies, one after the other: a machine that stops in between has one.
func (h *Header) Write(disk Disk) error {
	doc, err := json.Marshal(h.meta)
	if err != nil {
		return err
	}
	if len(doc) >= jsonSize {
		return fault.New(fault.Exhausted, "cannot write the header: it has no room for more keys")
	}
	h.seq++
	for i, magic := range []string{magic1, magic2} {
		b := make([]byte, headerSize)
		be := binary.BigEndian
		copy(b, magic)
		be.PutUint16(b[atVersion:], 2)
		be.PutUint64(b[atSize:], headerSize)
		be.PutUint64(b[atSeq:], h.seq)
		copy(b[atLabel:], h.label)
		copy(b[atAlg:], "sha256")
		rand.Read(b[atSalt : atSalt+64])
		copy(b[atUUID:], h.UUID)
		be.PutUint64(b[atOffset:], uint64(i*headerSize))
		copy(b[binarySize:], doc)
		sum := sha256.Sum256(b)
		copy(b[atSum:], sum[:])
		if _, err := disk.WriteAt(b, int64(i*headerSize)); err != nil {
			return fmt.Errorf("cannot write the header: %w", err)
		}
		if err := disk.Sync(); err != nil {
			return fmt.Errorf("cannot write the header: %w", err)
		}
	}
	return nil
}

// token is what all tokens have.
type token struct {
	Type     string   `json:"type"`
	KeySlots []string `json:"keyslots"`
}

// is reports whether a token is of a type and for one slot, and for which.
func is(raw json.RawMessage, kind string) (slot int, ok bool) {
	var t token
	if json.Unmarshal(raw, &t) != nil || t.Type != kind || len(t.KeySlots) != 1 {
		return 0, false
	}
	n, err := strconv.Atoi(t.KeySlots[0])
	return n, err == nil
}

// Tokens returns those of a type, by slot, as they were set.
func (h *Header) Tokens(kind string) map[int]json.RawMessage {
	out := map[int]json.RawMessage{}
	for _, raw := range h.meta.Tokens {
		if n, ok := is(raw, kind); ok {
			out[n] = raw
		}
	}
	return out
}

// SetToken says where the key of a slot comes from, instead of what a token of the
// type said of it: v is an object with further fields.
func (h *Header) SetToken(kind string, slot int, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	fields := map[string]json.RawMessage{}
	if err := json.Unmarshal(b, &fields); err != nil {
		return err
	}
	fields["type"], _ = json.Marshal(kind)
	fields["keyslots"], _ = json.Marshal([]string{strconv.Itoa(slot)})
	if b, err = json.Marshal(fields); err != nil {
		return err
	}
	for id, raw := range h.meta.Tokens {
		if n, ok := is(raw, kind); ok && n == slot {
			h.meta.Tokens[id] = b
			return nil
		}
	}
	for id := range 32 {
		if h.meta.Tokens[strconv.Itoa(id)] == nil {
			h.meta.Tokens[strconv.Itoa(id)] = b
			return nil
		}
	}
	return fault.New(fault.Exhausted, "the header has no room for a token")
}

// DropTokens removes those of a type, and says whether there were any.
func (h *Header) DropTokens(kind string) bool {
	had := len(h.meta.Tokens)
	maps.DeleteFunc(h.meta.Tokens, func(_ string, raw json.RawMessage) bool { _, ok := is(raw, kind); return ok })
	return len(h.meta.Tokens) < had
}
