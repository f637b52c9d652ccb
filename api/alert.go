package api

import "time"

// Alerts is what GET /servin/alerts answers.
type Alerts struct {
	// File holds the rules; Error says why its newest content is not used.
	File    string
	Error   string `json:",omitempty"`
	Rules   []AlertRule
	Actions []AlertAction
}

// AlertRule is one rule and what it says now: ok, pending (the condition holds,
// but not for long enough) or firing.
type AlertRule struct {
	Name, When string
	For        time.Duration
	Actions    []string
	State      string
	Alarms     []Alarm `json:",omitempty"`
}

// Alarm is a condition that holds; Container is empty if it is the engine's.
type Alarm struct {
	Container string `json:",omitempty"`
	Since     time.Time
	Firing    bool
}

// AlertAction counts what an action did since the engine started. Error is that
// of the last time.
type AlertAction struct {
	Name, Kind            string
	Done, Failed, Dropped uint64
	Error                 string `json:",omitempty"`
}

// AlertTest is the outcome of an action that was tested with
// POST /servin/alerts/{name}/test.
type AlertTest struct {
	Action string
	Error  string `json:",omitempty"`
}
