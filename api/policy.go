package api

import "time"

// Policy is the policy in force, GET /servin/policy.
type Policy struct {
	// Path of the document, "" without one: then everything is allowed.
	Path   string
	Loaded time.Time `json:",omitzero"`
	Rules  []string
	// Document is the text that was loaded.
	Document string
	// Problem is why a later document was not loaded.
	Problem string `json:",omitempty"`
}

// PolicyVerdict is what a policy says to a request, POST /servin/policy/test (a
// RunRequest), or that a document is sound, POST /servin/policy/check (YAML).
type PolicyVerdict struct {
	Allowed    bool
	Violations []string `json:",omitempty"`
	Rules      int      `json:",omitempty"`
}
